"""Makes the sounds of `mini`: concepts with eight takes each, as Opus files and `sounds.json.gz`.

    apt-get install fluidsynth fluid-soundfont-gm sonic-pi-samples      # Debian 12
    python -m tools.mini.data.sounds --out mmllm/mini/data              # about one minute

Most concepts are General MIDI instruments *rendered* by the `fluidsynth` program, some are
*synthesised* below, one is cut from *recorded* hits. Takes 0-5 train; takes 6 and 7 are held out:
their pitches, tempi and velocities lie between the trained ones, and no trained take has them.
The samples are the same on every run (an unchanged file is left alone: Ogg stamps a random serial).

Shapes: N = 32,768 samples at 16 kHz (2.048 s), mono, peak -1 dBFS.
"""
