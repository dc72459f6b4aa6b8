"""What a recipe will need, from configs alone: memory per rank by component, traffic per step, and whether it fits."""

from subnet_ft.plan.advice import Advice, advise
from subnet_ft.plan.build import Plan, Row, make_plan
from subnet_ft.plan.request import PLANNED, SHARDINGS, Request
from subnet_ft.plan.sizes import sizes_table
from subnet_ft.plan.units import parse_memory
from subnet_ft.plan.wording import lines_for_terminal, plan_to_dict

__all__ = [
    "PLANNED",
    "SHARDINGS",
    "Advice",
    "Plan",
    "Request",
    "Row",
    "advise",
    "lines_for_terminal",
    "make_plan",
    "parse_memory",
    "plan_to_dict",
    "sizes_table",
]
