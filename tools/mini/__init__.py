"""Makes what `mini` ships: its data, the codec and decoders, each by a command of its own."""
