"""Write the pairs, dialogues, validation dialogues and tests of `mini`'s data, and its plain texts.

    python -m tools.mini.data.dialogues                    # half a minute once replies are kept
    python -m tools.mini.data.dialogues --texts PACKAGES   # only data/text/, see the data's README

In: `concepts.json`, `captions.json`, gzipped `sounds.json` and `items.json`, and `prompts.json`
(phrasings by kind: train, validation, heldout; written by hand).
Out, gzipped: `pairs.jsonl`, `dialogues.jsonl`, `validation.jsonl`, `tests.jsonl`. The same input
gives the same text. Plain chat is answered by the base language model itself, greedily; its
replies are kept in --replies (ten minutes on one core when that file is absent).

Nothing is written before `check` has proved that no test phrasing, held-out name or test medium is
in what trains.
"""
