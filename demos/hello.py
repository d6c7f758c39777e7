"""The Python API in a few lines: draw, go on from there, play a sound, look at a picture.

python demos/hello.py
"""

import mmllm
from mmllm import Image, console, user

chat = mmllm.load("mini")

conversation = [user("Draw a red apple.")]
reply = chat.reply(conversation, seed=0)
console.echo(f"{conversation[0].text} -> {reply.media}")

conversation += [reply.message, user("What did you draw?")]
console.echo(f"{conversation[-1].text} -> {chat.reply(conversation, seed=0).text}")

bell = chat.reply([user("Let me hear a bell.")], modalities={"audio": "force"}, seed=0)
bell.media[0].save("bell.wav")

for medium in reply.media:
    apple = medium.save("apple.png")
    answer = chat.reply([user("What is this?", Image(apple))], modalities={"image": "forbid"})
    console.echo(f"What is this? {apple} -> {answer.text}")
