"""The OpenAI-compatible server: `mmllm serve`. It needs the extra `server`.

app.py        the routes; a table of contents
gate.py       before anything is parsed: who asks, from where, how much
schemas.py    what requests and responses look like; the OpenAPI document is made of it
intake.py     a request -> a conversation, its media checked and decoded within limits
remote.py     pictures, sounds and clips behind URLs, where that is allowed
engine.py     the line, and the threads that answer
responses.py    a reply -> a response, whole or in chunks
markdown.py   media in the text of a reply
kept.py       generated media behind URLs
forms.py      requests that are forms
pages.py      what a browser is shown
videos.py     clips as jobs
metrics.py    what Prometheus reads
errors.py     everything that goes wrong, as the API's own JSON
settings.py   the limits
listening.py  a socket, and uvicorn on it
"""
