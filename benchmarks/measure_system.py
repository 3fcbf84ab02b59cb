"""Process that measures one of our systems or transformers; `bench_serving.py` starts it."""

from serving.session import run_session
from serving.systems import open_system

if __name__ == "__main__":
    run_session(open_system)
