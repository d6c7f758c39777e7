"""The world of mini: things with colours, numbers, sizes and places, composed into scenes.

`things` is the vocabulary, `scenes` draws descriptions of scenes at random and says which
combinations are held out, `rendering` turns a description into pixels, and `captions` puts it into
words. Rendering takes about a millisecond, so training composes its scenes while it runs.
"""
