"""Problems with sound evaluations, for `mmllm.reasoning.search`."""

from mmllm.reasoning.problems.arithmetic import Arithmetic, calculate
from mmllm.reasoning.problems.blocksworld import Blocksworld
from mmllm.reasoning.problems.linear_regression import LinearRegression
from mmllm.reasoning.problems.salesman import TravellingSalesman

__all__ = ["Arithmetic", "Blocksworld", "LinearRegression", "TravellingSalesman", "calculate"]
