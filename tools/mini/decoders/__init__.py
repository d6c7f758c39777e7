"""Trains the decoders that ship with mini: captions -> images, videos and audio.

    python -m tools.mini.codec --out runs/decoders/codec
    python -m tools.mini.decoders image --words FOLDER --codec runs/decoders/codec \\
        --minutes 60 --run runs/decoders/image
    python -m tools.mini.decoders image --resume --run runs/decoders/image
    python -m tools.mini.decoders image --ship mmllm/mini/decoders/image --run runs/decoders/image

Each decoder is a standard diffusers pipeline: a small DiT denoises latents (of an autoencoder of
pictures, or stacked log-mel frames), and a small T5 trained with it reads the caption. Targets are
clean samples (Li & He 2025, "Back to basics") on the straight path x_s = (1 - s) x_0 + s n (Lipman
et al. 2023), with the error weighted as a velocity; the sampler is DPM-Solver++ (Lu et al. 2022).

Word vectors start from those of a sentence encoder (`--words`: an unpacked all-MiniLM-L6-v2),
reduced to the width of the T5. Their learning rate is five times that of the rest: when they
were frozen, the caption had no effect for thousands of steps.
"""
