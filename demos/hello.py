# %% [markdown]
# # Hello, mini
#
# The Python API in a few lines: draw, go on from there, play a sound, look at an image.
# `python demos/hello.py` runs them; `make docs/hello.ipynb` makes a notebook of them, in which each
# reply is shown as what it is.

# %%
import mmllm
from mmllm import Image, console

chat = mmllm.load("mini")

# %% [markdown]
# A conversation keeps its turns, so the second question is about the first answer.

# %%
conversation = chat.conversation()
drawn = conversation.reply("Draw a red apple.", seed=0)
console.echo(drawn)
drawn

# %%
console.echo(conversation.reply("What did you draw?", seed=0).text)

# %% [markdown]
# A reply may be asked for in one modality. Every file says inside that a model made it.

# %%
bell = chat.reply("Let me hear a bell.", modalities=["audio"], seed=0)
bell.save("bell.wav")
bell

# %% [markdown]
# What goes in may be text, images, sounds and clips, in any order.

# %%
apple = drawn.image.save("apple.png")
console.echo(chat.reply("What is this?", Image(apple)).text)
