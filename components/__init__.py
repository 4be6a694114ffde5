"""The rooms of the platform. Imported before torch, whatever is run: the last moment to tell OpenMP anything."""

import os

# Threads that wait by spinning cost a small training step five times its time (181 -> 1,000 ms) as soon as anything else
# wants a core; asleep they cost it nothing that could be measured (docs/log.md, 2026-11-22).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
