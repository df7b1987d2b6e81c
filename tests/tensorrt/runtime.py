"""The part of TensorRT that needs a GPU: an engine and its contexts, which run its ONNX file in onnxruntime.

Only the documented calls that backends/tensorrt.py makes exist, and they are as strict as documented: every tensor
needs an address, shapes lie inside the profile, a cache and its output lie at one address, and a context that has not
run yet cannot be captured. Memory is that of tests/tensorrt/driver.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tensorrt_rtx

from arkinfer.artifact.engine_recipe import PROFILES, EngineRecipe

TYPES = {
    "tensor(float16)": tensorrt_rtx.float16,
    "tensor(float)": tensorrt_rtx.float32,
    "tensor(int64)": tensorrt_rtx.int64,
    "tensor(int32)": tensorrt_rtx.int32,
}


@dataclass
class Scene:
    """What the runtime stands on: the device's memory, the file that the engine was built from, and how."""

    driver: Any
    model: Path
    recipe: EngineRecipe
    executed: list[tuple[int, int, int]] = field(default_factory=list)  # profile, tokens, rows

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(str(self.model), options, providers=["CPUExecutionProvider"])


CURRENT: list[Scene] = []  # the last is on


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, data: Any) -> Engine | None:
        if bytes(data[:4]) != b"vtrt":
            self.logger.log(tensorrt_rtx.ILogger.ERROR, "Magic tag does not match")
            return None
        return Engine(CURRENT[-1])


class Engine:
    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.tensors = {each.name: each for each in (*scene.session.get_inputs(), *scene.session.get_outputs())}
        self.inputs = [each.name for each in scene.session.get_inputs()]
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(PROFILES)
        self.device_memory_size_v2 = 12_345

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(extent if isinstance(extent, int) else -1 for extent in self.tensors[name].shape)

    def get_tensor_dtype(self, name: str) -> Any:
        return TYPES[self.tensors[name].type]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, how: Any) -> Context:
        if isinstance(how, RuntimeConfig):
            assert how.cuda_graph_strategy == tensorrt_rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            how = how.strategy
        assert how == tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)


class RuntimeConfig:
    cuda_graph_strategy: Any = None
    strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.scene = engine, engine.scene
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile: int | None = None
        self.memory = False
        self.ran = False

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0 and size >= self.engine.device_memory_size_v2
        self.scene.driver.at(memory, size)
        self.memory = True

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == int(self.scene.driver.stream)
        self.profile = index
        return index < self.engine.num_optimization_profiles

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self.engine.tensors:
            return False
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        recipe = self.scene.recipe
        limits = recipe.profiles[PROFILES[self.profile]]
        least, most = (min(256, recipe.capacity), recipe.capacity) if name == "span" else (1, getattr(limits, name))
        if name not in self.engine.inputs or len(shape) != 1 or not least <= shape[0] <= most:
            return False
        self.shapes[name] = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        driver = self.scene.driver
        assert stream == int(driver.stream) and self.memory and self.profile is not None
        moving = {name for name in self.engine.inputs if -1 in self.engine.get_tensor_shape(name)}
        if set(self.addresses) != set(self.engine.tensors) or set(self.shapes) != moving:
            return False
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        if driver.recording is None:
            self.ran = True
            self._run(addresses, shapes)
        else:
            assert self.ran, "captured before it ran as it is"
            driver.recording.append(lambda: self._run(addresses, shapes))
        return True

    def _run(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        assert self.profile is not None
        self.scene.executed.append((self.profile, shapes["tokens"][0], shapes["rows"][0]))
        arrays = {}
        for name in self.engine.inputs:
            dtype = np.dtype(tensorrt_rtx.nptype(self.engine.get_tensor_dtype(name)))
            shape = shapes.get(name) or self.engine.get_tensor_shape(name)
            memory = self.scene.driver.at(addresses[name], dtype.itemsize * int(np.prod(shape)))
            arrays[name] = memory.numpy().view(dtype).reshape(shape)
        names = [each.name for each in self.scene.session.get_outputs()]
        for name, value in zip(names, self.scene.session.run(names, arrays), strict=True):
            if name != "logits":
                assert addresses[name] == addresses[name.removesuffix(".out")], "a cache is not updated in place"
            data = value.reshape(-1).view(np.uint8)
            self.scene.driver.at(addresses[name], data.size).numpy()[:] = data
