"""Inference: a conversation in, a reply with text and media in order out.

A chat turn passes through the modules in this order:

    inputs, options   what people pass -> messages, sampling options, modality choices
    chat, session     the public API; one call is one ReplyRequest
    requests          its state machine: prefill -> text -> media -> done
    prefill           render and embed the prompts, look the prefix cache up
    engine            one per model: shares LLM steps and decoder batches between requests
    scheduler         who of the waiting threads does the shared work
    batching          continuous batching: sequences join and leave between forward passes
    sequence          one sequence: constraints, sampling, the tokens to feed next
    sampling          options of sampling; logits -> a token
    speculative       prompt-lookup decoding: draft tokens and their verification
    prefix_cache      key-value caches of former conversations
    media_queue       decoders' queues; a request for media gives a Future
    text_stream       tokens -> text deltas
    text_model        likelihoods of given replies, for mmllm.reasoning
    events, replies   what comes out

This module imports nothing: `import mmllm` loads neither torch nor transformers.
"""
