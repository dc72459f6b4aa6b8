"""Studies: the questions of the paper at the user's own scale, each a list of resumable runs and one page."""
