"""Answering many callers at once: the images that wait are computed together."""

import threading
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from torch import Tensor

from cifar_fastai.errors import UserError
from cifar_fastai.inference import Classifier, Verdict

MAX_WAITING = 32  # images taken together; one alone never waits for others


class NotReady(UserError):
    """The classifier has been closed."""


class BatchingClassifier(Classifier):
    """A Classifier for a server: one thread computes for all callers, and takes together whatever waits.

    On a CPU eight images together take the time of three or four alone. It answers a first image before it is ready, since
    that one is slow.
    """

    def __init__(self, export, expect_digest: str | None = None):
        """As for Classifier. Raises ExportError."""
        super().__init__(export, expect_digest)
        self._jobs: SimpleQueue = SimpleQueue()
        self._lock, self._closed = threading.Lock(), False  # so that no job comes in behind the end
        self._thread = threading.Thread(target=self._work, name="classifier", daemon=True)
        self._thread.start()
        self.submit(torch.zeros(1, 3, self.export.size, self.export.size, dtype=torch.uint8)).result()

    @property
    def ready(self) -> bool:
        return not self._closed and self._thread.is_alive()

    def submit(self, images: Tensor) -> Future:
        """A future of what `verdicts` gives for these images. Raises NotReady after `close`."""
        future: Future = Future()
        with self._lock:
            if not self.ready:
                raise NotReady("There is no model to ask: the server is stopping.")
            self._jobs.put((images, future))
        return future

    def verdicts(self, images: Tensor) -> list[Verdict]:
        return self.submit(images).result()

    def close(self) -> None:
        """Answer what waits, then nothing more."""
        with self._lock:
            self._closed = True
            self._jobs.put(None)
        self._thread.join()

    def _work(self):
        torch.set_num_threads(1)  # one picture is little to share out, and where others compute too, waiting costs far more
        while jobs := self._take():
            self._answer([(images, future) for images, future in jobs if future.set_running_or_notify_cancel()])

    def _take(self) -> list:
        """The jobs that wait, or the next one to come; none once closed."""
        jobs, n_images = [], 0
        while not jobs or (n_images < MAX_WAITING and not self._jobs.empty()):
            job = self._jobs.get()
            if job is None:
                if jobs:
                    self._jobs.put(None)  # for the next call
                break
            jobs.append(job)
            n_images += len(job[0])
        return jobs

    def _answer(self, jobs):
        try:
            verdicts = iter(super().verdicts(torch.cat([images for images, _ in jobs]))) if jobs else None
            for images, future in jobs:
                future.set_result([next(verdicts) for _ in images])
        except Exception as error:  # whatever it is, it belongs to the callers, not to this thread
            for _, future in jobs:
                future.set_exception(error)
