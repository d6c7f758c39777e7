"""The OpenAI-compatible server: `mmllm serve`. It needs the extra `server`.

app.py                 the ASGI application
routes/                the routes, one module for each kind
service.py             what the routes share, and how they have a reply generated
middleware.py          admission: host, token, number and size of requests
schemas.py             requests and responses; the OpenAPI document is made of them
responses_schemas.py   requests to the Responses API
bodies.py, forms.py    JSON and form bodies -> schemas
request_parsing.py     messages -> a conversation
reply_options.py       options -> keyword arguments of `Chat.reply`, within limits
media_decoding.py      media decoded in other processes, within limits
remote.py              media behind URLs, where that is allowed
dispatcher.py          the queue of jobs, and the threads that answer them
chat_responses.py      a reply -> a chat completion, whole or in chunks
responses_writer.py    a reply -> a response of the Responses API, whole or in events
encoding.py            what all responses share
markdown.py            media in the text of a reply
generated_files.py     generated media behind URLs
videos.py              videos as jobs
pages.py               pages for a browser
metrics.py             counts and times for Prometheus
errors.py              errors in the API's JSON
settings.py            limits and options
listener.py            the listening socket, and uvicorn
"""
