"""The app as separate processes with TLS and node keys, as ``docs/deployment.md`` describes."""

from fedomc_speech.deployment.keys import make_keys
from fedomc_speech.deployment.loopback import Loopback

__all__ = ["Loopback", "make_keys"]
