"""Runs in the environment of Vidur, not ours: its event loop and scheduler over a trace, every step taking the same time.

Vidur's own step times come from a hub that is not asked here; a constant costs it nothing, so the figure flatters Vidur.
Arguments: trace CSV (arrived_at, prompt, output), seconds of a step, sequences, token budget. Prints one JSON object.
"""

import csv
import json
import sys
import tempfile
import time


def main() -> None:
    """Serve the trace once."""
    trace, step_s, sequences, budget = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    from vidur.config import CacheConfig, ClusterConfig, MetricsConfig, ReplicaConfig, SimulationConfig
    from vidur.config.config import SarathiSchedulerConfig, SyntheticRequestGeneratorConfig
    from vidur.entities import Request
    from vidur.execution_time_predictor import BaseExecutionTimePredictor, ExecutionTimePredictorRegistry
    from vidur.request_generator import RequestGeneratorRegistry
    from vidur.request_generator.base_request_generator import BaseRequestGenerator
    from vidur.simulator import Simulator
    from vidur.types import ExecutionTimePredictorType, RequestGeneratorType

    class Constant:
        total_time = model_time = step_s
        num_layers = 1

    class Fixed(BaseExecutionTimePredictor):  # type: ignore[misc]
        def get_execution_time(self, batch: object, pipeline_stage: int) -> type:
            return Constant

    Fixed.__abstractmethods__ = frozenset()  # of single operations: a constant step has none

    class Trace(BaseRequestGenerator):  # type: ignore[misc]
        def generate_requests(self) -> list[object]:
            with open(trace, newline="") as f:
                return [Request(float(t), int(p), int(o)) for t, p, o in csv.reader(f)]

    for registry, key, kind in (
        (ExecutionTimePredictorRegistry, ExecutionTimePredictorType.RANDOM_FORREST, Fixed),
        (RequestGeneratorRegistry, RequestGeneratorType.SYNTHETIC, Trace),
    ):
        registry.unregister(key)
        registry.register(key, kind)
    names = ("write_metrics", "store_plots", "store_operation_metrics", "store_token_completion_metrics",
             "store_request_metrics", "store_batch_metrics", "store_utilization_metrics", "enable_chrome_trace",
             "write_json_trace", "keep_individual_batch_metrics")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = SimulationConfig(
            log_level="error",
            cluster_config=ClusterConfig(
                replica_config=ReplicaConfig(num_pipeline_stages=1, tensor_parallel_size=1),
                cache_config=CacheConfig(num_blocks=90000),
                replica_scheduler_config=SarathiSchedulerConfig(batch_size_cap=sequences, chunk_size=budget),
            ),
            request_generator_config=SyntheticRequestGeneratorConfig(),
            metrics_config=MetricsConfig(output_dir=folder, **dict.fromkeys(names, False)),
        )
        simulator = Simulator(config)
        began_s = time.process_time()
        simulator.run()
        cpu_s = time.process_time() - began_s
    print(json.dumps({"simulated_s": float(simulator._time), "cpu_s": cpu_s}))


main()
