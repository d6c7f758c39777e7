"""What a model can do, measured on held-out items: `mmllm evaluate mini --json FILE`.

    report = evaluate("mini", tasks=["text->image"], limit=50)
    report.metric("text->image").value

One table: a task's accuracy with its 95 % Wilson interval, its threshold, and whether that is met
(mmllm.evaluation.tasks holds the table as data). While a model is evaluated, no caption can reach a
decoder.
"""

from mmllm.evaluation.metrics import Metric
from mmllm.evaluation.report import EvaluationReport
from mmllm.evaluation.runner import evaluate

__all__ = ["EvaluationReport", "Metric", "evaluate"]
