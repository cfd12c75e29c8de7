"""The FFCV loader: reads `.beton` files with our own order, crop and flip. The only file of nulsq that imports ffcv.

FFCV's public order, flip and crop keep a random state per thread. They cannot be repeated with two workers, and an
epoch cannot be entered in its middle. So this loader hands FFCV the order of each epoch, and its crop and flip are FFCV
operations that hash the sample's index (`augment.py`). A value that compiled code captures is frozen at compile time.
The epoch therefore reaches that code as the *shape* of a buffer of zero bytes, which FFCV allocates for every epoch.
"""

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nulsq.data import beton_format
from nulsq.data.augment import FLIP, LEFT, TOP, center_crop, is_flipped, mix, resized_crop, uniform
from nulsq.data.manifest import DataSet, FileWatch
from nulsq.data.order import Order
from nulsq.data.transform import Transform
from nulsq.errors import InputError

_torch_threads = torch.get_num_threads()
import numba  # noqa: E402
import numba.extending  # noqa: E402
from ffcv.fields.rgb_image import IMAGE_MODES, ResizedCropRGBImageDecoder, SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode, resize_crop  # noqa: E402
from ffcv.loader import Loader, OrderOption  # noqa: E402
from ffcv.loader.epoch_iterator import IS_CUDA, EpochIterator  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.transforms import ToTensor, ToTorchImage  # noqa: E402

torch.set_num_threads(_torch_threads)  # importing ffcv sets it to 1


def _set_loader_threads(cls: type[Compiler], count: int) -> None:
    cls.num_threads = count
    numba.set_num_threads(count)


# At every epoch FFCV sets the number of torch's threads, for the whole process, to its number of workers; one worker
# would slow down the training step. FFCV has no option for it.
Compiler.set_num_threads = classmethod(_set_loader_threads)


def _hide_numba_finalizer_error(unraisable: Any, show: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """Do not show users the harmless KeyError that numba's finalizer of a compiled decoder raises."""
    innermost = unraisable.exc_traceback
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None or unraisable.exc_type is not KeyError \
            or not innermost.tb_frame.f_code.co_filename.endswith("numba/core/dispatcher.py"):
        show(unraisable)


sys.unraisablehook = _hide_numba_finalizer_error

# FFCV compiles with fastmath. These are compiled without it, so that they give exactly NumPy's numbers.
for _function in (mix, uniform):
    numba.extending.register_jitable(_function)
_uniform, _is_flipped, _resized_crop, _center_crop = (
    numba.njit(nogil=True)(function) for function in (uniform, is_flipped, resized_crop, center_crop))


class BetonLoader:
    """Yields (images uint8 [B, 3, H, W], labels int64 [B], indices int64 [B]) for each step of an epoch.

    The images are in FFCV's ring of buffers: use or copy them before taking the next batch. Raises InputError for a
    damaged file, one that changes while it is read, and a pipeline that fails or stalls.
    """

    def __init__(self, data: DataSet, split: str, order: Order, transform: Transform, workers: int = 1,
                 patience: float = 300):
        """workers: threads that decode. patience: seconds without a batch after which the pipeline has stalled."""
        self.order, self.patience = order, patience
        self.steps = len(order(0))
        self.path = path = data.path / f"{split}.beton"
        self.watch = FileWatch(path)
        labels = data.labels(split)
        beton_format.read(path, labels, data.files[path.name].records)
        self.labels = torch.from_numpy(labels)
        self.operations = _operations(data.storage, transform)
        decoder, *rest = self.operations
        threads = torch.get_num_threads()
        self.loader = Loader(
            str(self.path), batch_size=max((len(batch) for batch in order(0)), default=1),
            num_workers=max(1, workers), os_cache=True, order=OrderOption.SEQUENTIAL, drop_last=False,
            pipelines={"image": [decoder, *rest, ToTensor(), ToTorchImage()], "label": None},
        )
        torch.set_num_threads(threads)  # numba's threading layer may share OpenMP's number of threads with torch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = self.order(epoch)[start_step:]
        if not batches:
            return
        for operation in self.operations:
            operation.set_epoch(epoch)
        self.watch.raise_if_changed()
        thread = _EpochThread(self.loader, batches, self.path, self.patience)
        try:
            for batch, (images,) in zip(batches, thread, strict=True):
                self.watch.raise_if_changed()
                indices = torch.from_numpy(batch)
                yield images, self.labels[indices], indices
        finally:
            thread.close()


class _EpochThread(EpochIterator):
    """FFCV's thread that prepares the batches of one epoch; its errors reach the consumer.

    If an exception ends FFCV's own thread, the consumer waits forever; a photograph that the decoder rejects gives the
    pixels of another one. Here both are an InputError that names the samples. FFCV's public Loader has no hook for it.
    """

    def __init__(self, loader: Loader, batches: list[np.ndarray], path: Path, patience: float):
        self.batches, self.path, self.patience = batches, path, patience
        self.delivered = 0
        self.error: Exception | None = None
        super().__init__(loader, np.concatenate(batches))

    def run_pipeline(self, number: int, indices: np.ndarray, slot: int, event: Any) -> Any:
        try:
            result = super().run_pipeline(number, indices, slot, event)
            rejected = [index for flags in self._flags() for index in indices[flags[slot, :len(indices), 0] != 0]]
            if rejected:
                raise InputError(f"{self.path}: the photograph of sample {rejected[0]} is damaged, its decoder says")
            return result
        except Exception as error:
            self.error = error
            raise StopIteration from None  # FFCV's thread ends at this one, and the consumer gets None

    def __next__(self) -> Any:
        waited = 0.0
        while True:
            try:
                item = self.output_queue.get(timeout=min(1.0, self.patience))
                break
            except queue.Empty:
                waited += min(1.0, self.patience)
                if waited >= self.patience or not self.is_alive() and self.output_queue.empty():
                    what = f"gave nothing for {waited:.0f} seconds" if self.is_alive() else "has died"
                    raise InputError(f"{self.path}: the loader's thread {what}, at {self._position()}") from None
        if item is None:
            if isinstance(self.error, InputError):
                raise self.error
            if self.error is not None:
                raise InputError(f"{self.path}: {type(self.error).__name__} in the loader at {self._position()}: "
                                 f"{self.error}") from self.error
            raise StopIteration
        self.delivered += 1
        slot, result = item
        if IS_CUDA:
            self.current_stream.wait_stream(self.cuda_streams[slot])
        return result

    def close(self) -> None:
        """End the thread in any state. One that hangs ends with the process."""
        self.terminate_event.set()
        deadline = time.monotonic() + min(10.0, self.patience)
        while self.is_alive() and threading.current_thread() is not self and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                self.output_queue.get_nowait()  # the thread may be waiting for a free place in the queue
            self.join(timeout=0.02)
        super().close()

    def _flags(self) -> list[np.ndarray]:
        """Of each photograph decoder: nonzero where it rejected a sample, uint8 [slots, batch, 1]."""
        return [memory[2] for memory in self.memory_allocations["operation"].values()
                if isinstance(memory, tuple) and len(memory) == 4]

    def _position(self) -> str:
        batch = self.batches[min(self.delivered, len(self.batches) - 1)]
        return f"batch {self.delivered} of {len(self.batches)}, samples {', '.join(map(str, batch[:8]))}" \
               f"{', ...' if len(batch) > 8 else ''}"


def _operations(storage: str, transform: Transform) -> list[Any]:
    """A decoder, and operations after it; each has `set_epoch`."""
    if storage == "files":
        return [_Photograph(transform)]
    augmented = transform.crop == "pad" or transform.flip
    return [_Raw()] + ([_CropFlip(transform)] if augmented else [])


def _epoch_query(epoch: int) -> AllocationQuery:
    """A buffer without elements whose second dimension is the epoch."""
    return AllocationQuery((epoch, 0), np.dtype("u1"))


class _Raw(SimpleRGBImageDecoder):
    def set_epoch(self, epoch: int) -> None:
        pass


class _CropFlip(Operation):
    """Crop equal images from their zero-padded selves, and flip."""

    def __init__(self, transform: Transform):
        super().__init__()
        self.transform, self.epoch = transform, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, tuple[AllocationQuery, AllocationQuery]]:
        images = AllocationQuery(previous_state.shape, previous_state.dtype)
        return replace(previous_state, jit_mode=True), (images, _epoch_query(self.epoch))

    def generate_code(self) -> Callable[..., np.ndarray]:
        my_range = Compiler.get_iterator()
        seed = np.uint64(self.transform.seed)
        padding = self.transform.border
        may_flip = self.transform.flip
        draw = _uniform

        def crop_flip(images: Any, memory: Any, indices: Any) -> Any:
            out, epochs = memory
            epoch = np.uint64(epochs.shape[1])
            height, width = images.shape[1], images.shape[2]
            offsets = 2 * padding + 1
            for i in my_range(images.shape[0]):
                index = np.uint64(indices[i])
                top = int(draw(seed, epoch, index, TOP) * offsets) - padding
                left = int(draw(seed, epoch, index, LEFT) * offsets) - padding
                flipped_here = may_flip and draw(seed, epoch, index, FLIP) < 0.5
                for y in range(height):
                    for x in range(width):
                        column = width - 1 - x if flipped_here else x
                        row_in, column_in = y + top, column + left
                        inside = 0 <= row_in < height and 0 <= column_in < width
                        for channel in range(3):
                            out[i, y, x, channel] = images[i, row_in, column_in, channel] if inside else np.uint8(0)
            return out[:images.shape[0]]

        crop_flip.is_parallel = True  # type: ignore[attr-defined]
        crop_flip.with_indices = True  # type: ignore[attr-defined]
        return crop_flip


class _Photograph(ResizedCropRGBImageDecoder):
    """Decode a photograph, crop and resize it (area interpolation), and flip."""

    def __init__(self, transform: Transform):
        super().__init__((transform.size_at(0),) * 2)
        self.transform, self.epoch = transform, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before FFCV allocates the epoch's memory, so the size may change with the epoch."""
        self.epoch, self.output_size = epoch, (self.transform.size_at(epoch),) * 2

    get_crop_generator = None  # abstract in FFCV; unused, because the boxes come from augment.py

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, tuple[AllocationQuery, ...]]:
        state, queries = super().declare_state_and_memory(previous_state)
        return state, (*queries, AllocationQuery((1,), np.dtype("u1")), _epoch_query(self.epoch))

    def generate_code(self) -> Callable[..., np.ndarray]:
        jpg, mem_read, my_range = IMAGE_MODES["jpg"], self.memory_read, Compiler.get_iterator()
        decode_jpg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        seed, ratio = np.uint64(self.transform.seed), self.transform.ratio
        random_crop, may_flip = self.transform.crop == "resized", self.transform.flip
        random_box, central_box, flipped = _resized_crop, _center_crop, _is_flipped

        def decode(indices: Any, memory: Any, metadata: Any, storage_state: Any) -> Any:
            destination, scratch, rejected, epochs = memory
            epoch = np.uint64(epochs.shape[1])
            for i in my_range(len(indices)):
                index = np.uint64(indices[i])
                field = metadata[indices[i]]
                height, width = np.int64(field["height"]), np.int64(field["width"])
                data = mem_read(field["data_ptr"], storage_state)
                if field["mode"] == jpg:
                    pixels = scratch[i]
                    h, w = np.uint32(height), np.uint32(width)
                    rejected[i, 0] = decode_jpg(data, pixels, h, w, h, w, 0, 0, 1, 1, False, False) != 0
                    pixels = pixels.reshape(-1)[:3 * height * width].reshape(height, width, 3)
                else:
                    rejected[i, 0] = 0
                    pixels = data.reshape(height, width, 3)
                if random_crop:
                    top, left, h_box, w_box = random_box(seed, epoch, index, height, width)
                else:
                    top, left, h_box, w_box = central_box(height, width, ratio)
                resize(pixels, top, top + h_box, left, left + w_box, destination[i])
                if may_flip and flipped(seed, epoch, index):
                    destination[i] = destination[i, :, ::-1].copy()
            return destination[:len(indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode
