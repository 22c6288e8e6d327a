"""What the worker asks about the machine."""

import os


class current_platform:
    @staticmethod
    def is_cpu():
        return os.environ.get("FAKE_VLLM_PLATFORM", "cpu") == "cpu"
