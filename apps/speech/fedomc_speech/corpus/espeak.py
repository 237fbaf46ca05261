"""Text to speech with espeak-ng: a thin binding, and a separate process to run it in.

The audio of espeak-ng depends on its random numbers and on what it has said before. The same sentences therefore give
the same audio, bit for bit, only if a new process speaks all of them from the first. That process runs this file as a
script, which is why it imports nothing else of the application.
"""

import ctypes
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import IO

import numpy as np
import numpy.typing as npt

SAMPLE_RATE = 22_050
"""The sample rate of espeak-ng, in Hz."""

# From espeak-ng/speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_POS_CHARACTER = 1
_CHARS_UTF8 = 1
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_BUFFER_MILLISECONDS = 1000  # a short buffer cuts off the echo that some voices end with
_COUNT_BYTES = 4


class EspeakError(RuntimeError):
    """espeak-ng does not work, or does not know a voice."""


@dataclass(frozen=True)
class Speech:
    """A sentence to speak.

    Attributes:
        text: the words.
        voice: accent and variant, such as ``en-us+f2``. espeak-ng ignores unknown variants.
        rate: words a minute, 80 to 450.
        pitch: 0 to 100; 50 is the voice's normal pitch.
    """

    text: str
    voice: str
    rate: int
    pitch: int


class Espeak:
    """The espeak-ng library; a process can have only one.

    Args:
        seed: seed of its random numbers.

    Raises:
        EspeakError: the library does not start.
    """

    def __init__(self, seed: int) -> None:
        import espeakng_loader  # only the process that speaks needs it

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_Synth.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_uint,
            ctypes.c_int,
            ctypes.c_uint,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        data = os.fsencode(espeakng_loader.get_data_path())
        rate = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, _BUFFER_MILLISECONDS, data, 0)
        if rate != SAMPLE_RATE:
            raise EspeakError(f"espeak-ng started with {rate} instead of {SAMPLE_RATE} samples a second")
        self._chunks: list[bytes] = []
        self._callback = _Callback(self._receive)  # kept: the library holds no reference
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))

    def _receive(self, wave: "ctypes._Pointer[ctypes.c_short]", count: int, events: int | None) -> int:
        if wave:
            self._chunks.append(ctypes.string_at(wave, 2 * count))
        return 0

    def speak(self, speech: Speech) -> npt.NDArray[np.int16]:
        """Speak a sentence.

        Returns:
            int16 samples, ``[samples]``, at ``SAMPLE_RATE``.

        Raises:
            EspeakError: there is no such voice, or no sound was made.
        """
        if self._library.espeak_SetVoiceByName(speech.voice.encode()) != 0:
            raise EspeakError(f"espeak-ng has no voice {speech.voice!r}")
        self._library.espeak_SetParameter(_PARAMETER_RATE, speech.rate, 0)  # after the voice, which resets them
        self._library.espeak_SetParameter(_PARAMETER_PITCH, speech.pitch, 0)
        self._chunks.clear()
        text = speech.text.encode()
        status = self._library.espeak_Synth(text, len(text) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None)
        samples = np.frombuffer(b"".join(self._chunks), np.int16)
        if status != 0 or not samples.any():
            raise EspeakError(f"espeak-ng made no sound of {speech.text!r} in the voice {speech.voice!r}")
        return samples


def synthesize(speeches: Sequence[Speech], seed: int = 0) -> Generator[npt.NDArray[np.int16], None, None]:
    """Speak sentences one after the other in a new process, so that they sound the same each time.

    Close the iterator to end the process early.

    Yields:
        int16 samples of each sentence, ``[samples]``, at ``SAMPLE_RATE``.

    Raises:
        EspeakError: the process failed; the message says why.
    """
    with tempfile.TemporaryFile() as request, tempfile.TemporaryFile() as errors:
        request.write(json.dumps({"seed": seed, "speeches": [asdict(speech) for speech in speeches]}).encode())
        request.seek(0)
        command = [sys.executable, "-P", __file__]
        with subprocess.Popen(  # noqa: S603 (nothing in the command comes from outside)
            command, stdin=request, stdout=subprocess.PIPE, stderr=errors
        ) as process:
            assert process.stdout is not None  # noqa: S101 (it is a pipe)
            try:
                for _ in speeches:
                    count = int.from_bytes(process.stdout.read(_COUNT_BYTES), sys.byteorder)
                    data = process.stdout.read(2 * count)
                    if not count or len(data) < 2 * count:
                        process.wait()
                        errors.seek(0)
                        lines = errors.read().decode(errors="replace").split("\n")
                        raise EspeakError(next((line for line in reversed(lines) if line), f"it ended: {process}"))
                    yield np.frombuffer(data, np.int16)
            finally:
                process.kill()


def resample(samples: npt.NDArray[np.int16], rate: int, new_rate: int) -> npt.NDArray[np.float64]:
    """Resample audio with a windowed sinc, which removes frequencies that the lower rate cannot represent.

    The filter is rounded to multiples of 2^-24, so that every sum is exact and all machines give the same result.

    Args:
        samples: int16 ``[samples]``.
        rate: sample rate of ``samples`` in Hz.
        new_rate: sample rate of the result in Hz.

    Returns:
        float64 ``[ceil(samples * new_rate / rate)]``, in the units of ``samples``.
    """
    divisor = math.gcd(rate, new_rate)
    step, phases = rate // divisor, new_rate // divisor  # every ``step`` inputs give ``phases`` outputs
    filters = _filters(step, phases)
    taps = filters.shape[1]
    length = -(-len(samples) * phases // step)
    blocks = -(-length // phases)
    padded = np.zeros(blocks * step + taps)
    padded[taps // 2 : taps // 2 + len(samples)] = samples
    windows = np.lib.stride_tricks.sliding_window_view(padded, taps)
    result = np.empty((blocks, phases))
    for phase in range(phases):
        inputs = windows[phase * step // phases :: step][:blocks]
        result[:, phase] = np.einsum(
            "bt,t->b", inputs, filters[phase]
        )  # @ starts threads, which cost more than they do
    return result.reshape(-1)[:length]


@functools.cache
def _filters(step: int, phases: int) -> npt.NDArray[np.float64]:
    """Compute the weights of the inputs around each output of a block, [phases, taps]."""
    zeros, beta, roll_off = 24, 10.0, 0.95
    cutoff = roll_off * min(1.0, phases / step)
    margin = math.ceil(zeros / cutoff)
    position = np.arange(phases)[:, None] * step / phases
    distance = np.arange(-margin, margin + 1) - position % 1
    window = np.i0(beta * np.sqrt(np.clip(1 - (distance / margin) ** 2, 0, None))) * (abs(distance) < margin)
    filters = np.sinc(cutoff * distance) * window
    rounded: npt.NDArray[np.float64] = np.round(filters / filters.sum(1, keepdims=True) * 2**24) / 2**24
    return rounded


def _main(request: IO[str], reply: IO[bytes]) -> None:
    task = json.load(request)
    espeak = Espeak(task["seed"])
    for speech in task["speeches"]:
        samples = espeak.speak(Speech(**speech))
        reply.write(len(samples).to_bytes(_COUNT_BYTES, sys.byteorder))
        reply.write(samples.tobytes())
    reply.flush()


if __name__ == "__main__":
    _main(sys.stdin, sys.stdout.buffer)
