"""`mmllm plan`: parameters, memory, disk and operations of a system and its stages."""

from mmllm.planning.flops import operations
from mmllm.planning.memory import activations, measure
from mmllm.planning.parts import Part, parts_of
from mmllm.planning.planner import Plan, StagePlan, plan, plan_stage
from mmllm.planning.rendering import renderer
from mmllm.planning.report import render

__all__ = [
    "Part",
    "Plan",
    "StagePlan",
    "activations",
    "measure",
    "operations",
    "parts_of",
    "plan",
    "plan_stage",
    "render",
    "renderer",
]
