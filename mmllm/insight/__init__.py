"""What goes on inside a model: states at named sites, edited and steered, over text and all media.

    from mmllm import insight

    with insight.look(chat, "layers.18") as seen:
        chat.reply("Draw a dog.")

The ordinary user pays nothing for it: `import mmllm` does not import this package.
"""

from mmllm.insight.hooks import Recording, edit, look
from mmllm.insight.positions import Positions
from mmllm.insight.sites import sites

__all__ = ["Positions", "Recording", "edit", "look", "sites"]
