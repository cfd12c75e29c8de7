"""The FFCV loader: reads `.beton` files with our own order, crop and flip. The library's only file with ffcv in it.

FFCV's order, flip and crop have random states of their own, per thread; they cannot be repeated with two workers or
entered in the middle of an epoch. So the order is handed to FFCV batch by batch, and crop and flip are operations
that hash the sample's index (`augment.py`). The epoch reaches the compiled code as the *shape* of a buffer of zero
bytes, which FFCV allocates anew for each epoch: a captured value would be frozen at compile time.
"""

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nulsq.data import beton_format
from nulsq.data.augment import _mix, center_crop, is_flipped, resized_crop, uniform
from nulsq.data.manifest import DataSet, Watch
from nulsq.data.order import Order
from nulsq.data.transform import View
from nulsq.errors import InputError

_threads = torch.get_num_threads()
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

torch.set_num_threads(_threads)  # importing ffcv sets it to 1


def _set_loader_threads(cls, count):
    cls.num_threads = count
    numba.set_num_threads(count)


# FFCV sets torch's threads to its own number of workers, for the whole process, at every epoch: the training step
# would slow down because the loader has one worker.
Compiler.set_num_threads = classmethod(_set_loader_threads)


def _without_numba_noise(unraisable, show=sys.unraisablehook):
    """numba's finalizer of a compiled decoder raises a harmless KeyError; do not show it to users."""
    where = unraisable.exc_traceback
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    if where is None or unraisable.exc_type is not KeyError \
            or not where.tb_frame.f_code.co_filename.endswith("numba/core/dispatcher.py"):
        show(unraisable)


sys.unraisablehook = _without_numba_noise

# Compiled here without fastmath, which FFCV compiles with: they must give the very numbers that NumPy gives.
for _function in (_mix, uniform):
    numba.extending.register_jitable(_function)
_uniform, _is_flipped, _resized_crop, _center_crop = (
    numba.njit(nogil=True)(function) for function in (uniform, is_flipped, resized_crop, center_crop))


class BetonLoader:
    """Yields (images uint8 [B, 3, H, W], labels int64 [B], indices int64 [B]) for each step of an epoch.

    Images lie in FFCV's ring of buffers: use them (or copy) before asking for the next batch.
    """

    def __init__(self, data: DataSet, split: str, order: Order, view: View, workers: int = 1, patience: float = 300):
        """`patience`: seconds without a batch after which the pipeline counts as stalled."""
        self.order, self.patience = order, patience
        self.steps = len(order(0))
        self.path = data.beton(split)
        self.watch = Watch(self.path)
        labels = data.labels(split)
        beton_format.read(self.path, labels, data.files[self.path.name].records)
        self.labels = torch.from_numpy(labels)
        self.keyed = _operations(data.kind, view)
        decoder, *rest = self.keyed
        threads = torch.get_num_threads()
        self.loader = Loader(
            str(self.path), batch_size=max((len(batch) for batch in order(0)), default=1),
            num_workers=max(1, workers), os_cache=True, order=OrderOption.SEQUENTIAL, drop_last=False,
            pipelines={"image": [decoder, *rest, ToTensor(), ToTorchImage()], "label": None},
        )
        torch.set_num_threads(threads)  # numba's threading layer may share OpenMP's setting with torch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = self.order(epoch)[start_step:]
        if not batches:
            return
        for operation in self.keyed:
            operation.enter(epoch)
        self.watch.look()
        images = _Watched(self.loader, batches, self.path, self.patience)
        try:
            for indices, (pixels,) in zip(batches, images, strict=True):
                self.watch.look()
                indices = torch.from_numpy(indices)
                yield pixels, self.labels[indices], indices
        finally:
            images.close()


class _Watched(EpochIterator):
    """FFCV's thread of one epoch, which otherwise dies of an exception and leaves who waits for it waiting for ever.

    What goes wrong in it, a photograph that its decoder refuses too, is an InputError here that names the samples.
    """

    def __init__(self, loader: Loader, batches: list[np.ndarray], path, patience: float):
        self.batches, self.path, self.patience = batches, path, patience
        self.given, self.problem = 0, None
        super().__init__(loader, np.concatenate(batches))

    def run_pipeline(self, number, indices, slot, event):
        try:
            result = super().run_pipeline(number, indices, slot, event)
            refused = [index for flags in self._flags() for index in indices[flags[slot, :len(indices), 0] != 0]]
            if refused:
                raise InputError(f"{self.path}: the photograph of sample {refused[0]} is damaged, its decoder says")
            return result
        except Exception as error:
            self.problem = error
            raise StopIteration from None  # what FFCV's thread ends at

    def __next__(self):
        waited = 0.0
        while True:
            try:
                found = self.output_queue.get(timeout=min(1.0, self.patience))
                break
            except queue.Empty:
                waited += min(1.0, self.patience)
                if waited >= self.patience or not self.is_alive() and self.output_queue.empty():
                    what = f"gave nothing for {waited:.0f} seconds" if self.is_alive() else "has died"
                    raise InputError(f"{self.path}: the loader's thread {what}, at {self._where()}") from None
        if found is None:
            if isinstance(self.problem, InputError):
                raise self.problem
            if self.problem is not None:
                raise InputError(f"{self.path}: {type(self.problem).__name__} in the loader at {self._where()}: "
                                 f"{self.problem}") from self.problem
            raise StopIteration
        self.given += 1
        slot, result = found
        if IS_CUDA:
            self.current_stream.wait_stream(self.cuda_streams[slot])
        return result

    def close(self):
        """End the thread, wherever it is; one that hangs ends with the process."""
        self.terminate_event.set()
        until = time.monotonic() + min(10.0, self.patience)
        while self.is_alive() and threading.current_thread() is not self and time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                self.output_queue.get_nowait()  # it may wait to hand over a batch, or its end
            self.join(timeout=0.02)
        super().close()

    def _flags(self):
        return [memory[2] for memory in self.memory_allocations["operation"].values()
                if isinstance(memory, tuple) and len(memory) == 4]

    def _where(self):
        batch = self.batches[min(self.given, len(self.batches) - 1)]
        return f"batch {self.given} of {len(self.batches)}, samples {', '.join(map(str, batch[:8]))}" \
               f"{', ...' if len(batch) > 8 else ''}"


def _operations(kind, view):
    if kind == "files":
        return [_Photograph(view)]
    augmented = view.crop == "pad" or view.flip
    return [_Plain()] + ([_CropFlip(view)] if augmented else [])


def _epoch_query(epoch):
    return AllocationQuery((epoch, 0), np.dtype("u1"))


class _Plain(SimpleRGBImageDecoder):
    def enter(self, epoch: int) -> None:
        pass


class _CropFlip(Operation):
    """Random crop from the zero-padded image, and flip, of equal raw images."""

    def __init__(self, view: View):
        super().__init__()
        self.view, self.epoch = view, 0

    def enter(self, epoch: int) -> None:
        self.epoch = epoch

    def declare_state_and_memory(self, previous_state):
        own = AllocationQuery(previous_state.shape, previous_state.dtype)
        return replace(previous_state, jit_mode=True), (own, _epoch_query(self.epoch))

    def generate_code(self):
        my_range = Compiler.get_iterator()
        seed = np.uint64(self.view.seed)
        padding = self.view.border
        may_flip = self.view.flip
        draw = _uniform

        def crop_flip(images, memory, indices):
            out, epochs = memory
            epoch = np.uint64(epochs.shape[1])
            height, width = images.shape[1], images.shape[2]
            offsets = 2 * padding + 1
            for i in my_range(images.shape[0]):
                index = np.uint64(indices[i])
                top = int(draw(seed, epoch, index, np.uint64(0)) * offsets) - padding
                left = int(draw(seed, epoch, index, np.uint64(1)) * offsets) - padding
                mirrored = may_flip and draw(seed, epoch, index, np.uint64(2)) < 0.5
                for y in range(height):
                    for x in range(width):
                        column = width - 1 - x if mirrored else x
                        row_in, column_in = y + top, column + left
                        inside = 0 <= row_in < height and 0 <= column_in < width
                        for channel in range(3):
                            out[i, y, x, channel] = images[i, row_in, column_in, channel] if inside else np.uint8(0)
            return out[:images.shape[0]]

        crop_flip.is_parallel = True
        crop_flip.with_indices = True
        return crop_flip


class _Photograph(ResizedCropRGBImageDecoder):
    """Decode a photograph, cut out its box and resize it (area interpolation); perhaps flip."""

    def __init__(self, view: View):
        super().__init__((view.size_at(0),) * 2)
        self.view, self.epoch = view, 0

    def enter(self, epoch: int) -> None:
        """FFCV asks for memory at the start of each epoch: by then epoch and size are settled."""
        self.epoch, self.output_size = epoch, (self.view.size_at(epoch),) * 2

    get_crop_generator = None  # abstract in FFCV; the boxes come from augment.py

    def declare_state_and_memory(self, previous_state):
        state, queries = super().declare_state_and_memory(previous_state)
        return state, (*queries, AllocationQuery((1,), np.dtype("u1")), _epoch_query(self.epoch))

    def generate_code(self):
        jpg, mem_read, my_range = IMAGE_MODES["jpg"], self.memory_read, Compiler.get_iterator()
        decode_jpg, resize = Compiler.compile(imdecode), Compiler.compile(resize_crop)
        seed, ratio = np.uint64(self.view.seed), self.view.ratio
        random_crop, may_flip = self.view.crop == "resized", self.view.flip
        random_box, central_box, flipped = _resized_crop, _center_crop, _is_flipped

        def decode(indices, memory, metadata, storage_state):
            destination, scratch, refused, epochs = memory
            epoch = np.uint64(epochs.shape[1])
            for i in my_range(len(indices)):
                index = np.uint64(indices[i])
                field = metadata[indices[i]]
                height, width = np.int64(field["height"]), np.int64(field["width"])
                data = mem_read(field["data_ptr"], storage_state)
                if field["mode"] == jpg:
                    pixels = scratch[i]
                    h, w = np.uint32(height), np.uint32(width)
                    refused[i, 0] = decode_jpg(data, pixels, h, w, h, w, 0, 0, 1, 1, False, False) != 0
                    pixels = pixels.reshape(-1)[:3 * height * width].reshape(height, width, 3)
                else:
                    refused[i, 0] = 0
                    pixels = data.reshape(height, width, 3)
                if random_crop:
                    top, left, h_box, w_box = random_box(seed, epoch, index, height, width)
                else:
                    top, left, h_box, w_box = central_box(height, width, ratio)
                resize(pixels, top, top + h_box, left, left + w_box, destination[i])
                if may_flip and flipped(seed, epoch, index):
                    destination[i] = destination[i, :, ::-1].copy()
            return destination[:len(indices)]

        decode.is_parallel = True
        return decode
