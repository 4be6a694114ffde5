import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no start and stop messages of torch's profiler, which tracks memory
