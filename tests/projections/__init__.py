"""Tests of mmllm.projections."""
