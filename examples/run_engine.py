"""Answer a question with an engine of build_engine.py: python run_engine.py CHECKPOINT ENGINE.plan QUESTION

It needs a GPU. The loop is that of run_onnx.py. Each call copies the cache to the GPU and back; `glmtrt chat` does not.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import tensorrt_rtx as trt
from cuda.bindings import runtime as cuda
from run_onnx import answer


def check(status, *values):
    """What a call of CUDA's returns after its status. Raises RuntimeError for any other status than success."""
    if int(status) != 0:
        raise RuntimeError(str(status))
    return values[0] if values else None


def open_engine(plan_path):
    """The engine of a plan, an execution context and a stream."""
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(Path(plan_path).read_bytes())
    return engine, engine.create_execution_context(), check(*cuda.cudaStreamCreate())


def run_engine(engine, context, stream, feeds):
    """The outputs of one call, by name."""
    context.set_optimization_profile_async(int(feeds["input_ids"].shape[1] == 1), stream)
    for name, array in feeds.items():
        context.set_input_shape(name, array.shape)
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    results = {name: np.empty(context.get_tensor_shape(name), np.float16) for name in names if name not in feeds}
    memory = {}
    for name, array in (feeds | results).items():
        memory[name] = check(*cuda.cudaMalloc(max(array.nbytes, 1)))
        context.set_tensor_address(name, memory[name])
    to_gpu, to_host = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
    for name, array in feeds.items():
        check(*cuda.cudaMemcpyAsync(memory[name], array.ctypes.data, array.nbytes, to_gpu, stream))
    if not context.execute_async_v3(stream):
        raise RuntimeError("TensorRT did not run the engine; its log says why")
    for name, array in results.items():
        check(*cuda.cudaMemcpyAsync(array.ctypes.data, memory[name], array.nbytes, to_host, stream))
    check(*cuda.cudaStreamSynchronize(stream))
    for address in memory.values():
        check(*cuda.cudaFree(address))
    return results


if __name__ == "__main__":
    print(answer(sys.argv[1], partial(run_engine, *open_engine(sys.argv[2])), sys.argv[3]))
