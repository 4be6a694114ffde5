import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which follows memory here, prints when it starts and stops
