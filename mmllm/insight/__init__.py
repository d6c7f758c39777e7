"""What goes on inside a model: states at named sites, edited and steered, over text and all media.

    from mmllm import insight

    with insight.look(chat, "layers.18") as seen:
        chat.reply("Draw a dog.")

The ordinary user pays nothing for it: `import mmllm` does not import this package.
"""

from mmllm.insight.anomaly import Anomaly, AnomalyDetector
from mmllm.insight.heads import Head, HeadTable, ablated, attention_patterns, head_table
from mmllm.insight.hooks import Recording, edit, look
from mmllm.insight.learning import Example, copying, template_task
from mmllm.insight.positions import Positions
from mmllm.insight.sites import sites
from mmllm.insight.steering import Direction, difference, perplexity_rise, steer

__all__ = [
    "Anomaly",
    "AnomalyDetector",
    "Direction",
    "Example",
    "Head",
    "HeadTable",
    "Positions",
    "Recording",
    "ablated",
    "attention_patterns",
    "copying",
    "difference",
    "edit",
    "head_table",
    "look",
    "perplexity_rise",
    "sites",
    "steer",
    "template_task",
]
