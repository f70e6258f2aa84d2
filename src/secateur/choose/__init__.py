"""WHAT goes: budgets, costs, ranking, search, and the plan that records the decision."""

from secateur.choose.budget import Budget, Limit
from secateur.choose.cost import Costs, Workload, costs
from secateur.choose.plan import Kept, Plan, diff

__all__ = ["Budget", "Costs", "Kept", "Limit", "Plan", "Workload", "costs", "diff"]
