"""Locks that are the whole process's."""

from __future__ import annotations

import threading

LOADING = threading.RLock()
"""Held while modules are created and their weights read after a model was loaded. Meanwhile the
libraries switch what is the whole process's: accelerate lets every new parameter, of any thread, be
a tensor on the meta device."""
