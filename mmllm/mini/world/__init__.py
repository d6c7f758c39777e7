"""The world of mini: things with colours, numbers, sizes and places, composed into scenes.

`things` is the vocabulary, `scenes` and `clips` draw descriptions at random and say which
combinations are held out, `rendering` turns them into pixels, `captions` puts them into words, and
`edits` changes them as people ask. Rendering takes a millisecond: training composes as it runs.
"""
