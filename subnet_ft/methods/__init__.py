"""What else can be trained: masks by rule, and adapters, built, saved and loaded by the name of a method."""
