"""Frozen diffusion pipelines that generate media from a predicted condition.

contract    what a family of pipelines writes: start here to add one
decoder     what all families share: encoding, the denoising loss, sampling
visual      images and video: sizes, pixels; audio: lengths, waveforms
config      fields of configs, and which of them one call may override
loading     folders on disk, and the pipeline in memory
img2img     starting from a medium
fingerprints  what identifies the encoding of captions and media
schedules   training noise, and solvers for sampling
caching     step caching; callbacks: progress and previews; prompts, latents: helpers of families

All other modules are families.
"""
