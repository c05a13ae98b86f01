"""A torch that behaves, as far as the guest can see: a caching allocator on each of some made-up GPUs.

`torch.contexts` has the devices that were opened, at half a GiB each; `torch.started_by` what started CUDA.
`torch.cuda.capture` is a CUDA graph with a pool of its own, `install_sleep_mode` vLLM's sleep mode.
"""

import sys
from types import ModuleType, SimpleNamespace

MIB, GIB = 2**20, 2**30


def install(gpus=2, total_bytes=80 * GIB, *, knows_contexts=True, tells_uuids=True):
    """Put it where `import torch` finds it; gives the module."""
    torch, cuda, c = (ModuleType(name) for name in ("torch", "torch.cuda", "torch._C"))
    torch.cuda, torch._C, torch.contexts, torch.started_by = cuda, c, set(), []
    torch.cuda.OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})
    observers, devices = [], [Device(total_bytes) for _ in range(gpus)]
    torch.devices, torch.observers = devices, observers
    state = SimpleNamespace(initialized=False)

    def start(why):
        if not state.initialized:
            torch.started_by.append(why)
            state.initialized = True

    def asked(index, what, *, opens=False):
        start(what)
        if opens and index not in torch.contexts:
            torch.contexts.add(index)
        return devices[index]

    def allocate(index, size):
        device = asked(index, "allocate", opens=True)
        if not device.allocate(size):
            for observer in observers:
                observer(index, size, device.total_bytes, device.free_bytes)
            raise torch.cuda.OutOfMemoryError(f"Tried to allocate {size} bytes")

    def properties(index):
        uuid = f"00000000-0000-0000-0000-{index:012}"
        return SimpleNamespace(uuid=uuid) if tells_uuids else SimpleNamespace()

    def snapshot(*, include_traces=True):
        return [s for i, device in enumerate(devices) for s in device.segments(i)]

    def empty_cache():
        for device in devices:
            device.reserved = device.allocated

    cuda.init = lambda: start("init")
    cuda.is_initialized = lambda: state.initialized
    cuda.device_count = lambda: start("device_count") or gpus
    cuda.memory_stats = lambda index: asked(index, "memory_stats").stats()
    cuda.memory_reserved = lambda index: asked(index, "memory_reserved").held
    cuda.mem_get_info = lambda index: asked(index, "mem_get_info", opens=True).info()
    cuda.get_device_properties = lambda index: start("properties") or properties(index)
    cuda.memory_snapshot = lambda **how: start("snapshot") or snapshot(**how)
    cuda.empty_cache = lambda: start("empty_cache") or empty_cache()
    cuda.capture = lambda index, size, kept=0: devices[index].take((0, 1), size, free=size - kept)
    cuda.allocate, cuda.free = allocate, lambda index, size: devices[index].free(size)
    c._cuda_attach_out_of_memory_observer = lambda seen: start("attach") or observers.append(seen)
    if knows_contexts:
        c._cuda_hasPrimaryContext = lambda index: index in torch.contexts
    sys.modules |= {"torch": torch, "torch.cuda": cuda, "torch._C": c}
    return torch


def install_sleep_mode(torch, *, notes=True):
    """vLLM's `CuMemAllocator`; a vLLM that does not note who sleeps has `notes=False`."""
    module = ModuleType("vllm.device_allocator.cumem")
    module.CuMemAllocator = SimpleNamespace(instance=SleepMode(torch.devices, notes=notes))
    sys.modules[module.__name__] = module
    return module.CuMemAllocator.instance


class SleepMode:
    """Torch goes on counting what it unmaps; what is trimmed it forgets itself."""

    def __init__(self, devices, *, notes):
        self.devices, self.notes, self.pointer_to_data = devices, notes, {}

    def put(self, tag, size, index=0):
        pointer = self.devices[index].take((1, 0), size)
        data = SimpleNamespace(handle=(index, size, pointer, 7), tag=tag, cpu_backup_tensor=None)
        self.pointer_to_data[pointer] = data
        if self.notes:
            data.is_asleep = False
        return pointer

    def sleep(self, *offloaded):
        for data in self.pointer_to_data.values():
            if data.tag in offloaded:
                data.cpu_backup_tensor = object()
            if self.notes:
                data.is_asleep = True

    def trim(self, pointer):
        index, size, _, _ = self.pointer_to_data.pop(pointer).handle
        self.devices[index].private[pointer] = (1, 0), size, size


class Device:
    """Reserves in whole segments of 20 MiB and keeps what is freed; `private` are other pools."""

    def __init__(self, total_bytes):
        self.total_bytes, self.allocated, self.reserved, self.ever = total_bytes, 0, 0, 0
        self.retries = self.ooms = 0
        self.private = {}  # by address: pool, size and free bytes

    @property
    def held(self):
        return self.reserved + sum(size for _, size, _ in self.private.values())

    @property
    def free_bytes(self):
        return self.total_bytes - self.held

    def take(self, pool, size, free=0):
        address = 2**40 + sum(size for _, size, _ in self.private.values())
        self.private[address], self.ever = (pool, size, free), self.ever + size
        return address

    def allocate(self, size):
        needed = max(0, self.allocated + size - self.reserved)
        grown = -(-needed // (20 * MIB)) * 20 * MIB
        if grown > self.free_bytes:
            self.retries += 1
            self.ooms += 1
            return False
        self.allocated, self.reserved, self.ever = (
            self.allocated + size,
            self.reserved + grown,
            self.ever + grown,
        )
        return True

    def free(self, size):
        self.allocated -= size

    def info(self):
        return self.free_bytes, self.total_bytes

    def stats(self):
        if not self.ever:
            return {}
        allocated = self.allocated + sum(size - free for _, size, free in self.private.values())
        return {
            "allocated_bytes.all.current": allocated,
            "reserved_bytes.all.current": self.held,
            "reserved_bytes.all.allocated": self.ever,
            "active_bytes.all.current": allocated,
            "inactive_split_bytes.all.current": 3 * MIB,
            "num_alloc_retries": self.retries,
            "num_ooms": self.ooms,
            "segment.all.current": 1,
        }

    def segments(self, index):
        rest = self.reserved - self.allocated
        blocks = [{"size": self.allocated, "state": "active_allocated"}, {"size": rest, "state": "inactive"}]
        if self.reserved:
            yield segment(index, 2**32, self.reserved, blocks, (0, 0))
        for address, (pool, size, free) in self.private.items():
            used = {"size": size - free, "state": "active_allocated"}
            yield segment(index, address, size, [used, {"size": free, "state": "inactive"}], pool)


def segment(index, address, size, blocks, pool):
    told = {"device": index, "address": address, "total_size": size, "segment_type": "large"}
    return {**told, "is_expandable": False, "segment_pool_id": pool, "blocks": blocks}
