"""Flower's simulation, Ray with two actors, on the workload: python with_flower.py W1."""

import importlib.metadata
import os
import pathlib
import sys
import tempfile
import time

os.environ |= dict(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")

import numpy as np
import torch
import torch_model
import workload
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation


def client(model, folder):
    """What a node runs: it trains the client that a message names, whose data lie in `folder`."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        network = torch_model.Network(model)
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        index = message.content["config"]["client"]
        x, y = (torch.tensor(np.load(folder / f"{name}.npy", mmap_mode="r")[index]) for name in "xy")
        optimizer = torch.optim.SGD(network.parameters(), workload.RATE)
        for batch in zip(x.split(workload.BATCH), y.long().split(workload.BATCH), strict=True):
            optimizer.zero_grad()
            network.loss(*batch).backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(x)})
        return Message(RecordDict(dict(arrays=ArrayRecord(network.state_dict()), metrics=metrics)), reply_to=message)

    return app


def server(name, test):
    """What leads the rounds, and reports."""
    app = ServerApp()
    work = workload.WORKLOADS[name]

    @app.main()
    def main(grid, context):
        while len(nodes := list(grid.get_node_ids())) < work.clients:
            time.sleep(0.1)
        network, strategy = torch_model.initial(work.model), FedAvg()
        arrays = ArrayRecord(network.state_dict())

        def message(index):
            content = RecordDict(dict(arrays=arrays, config=ConfigRecord({"client": index})))
            return Message(content, nodes[index], MessageType.TRAIN)

        def one(number):
            nonlocal arrays
            replies = grid.send_and_receive([message(int(i)) for i in workload.cohort(number, work)])
            if any(reply.has_error() for reply in replies):
                raise RuntimeError("a client failed")
            arrays, _ = strategy.aggregate_train(number, replies)

        seconds = workload.timed(one, work, lambda: None)
        network.load_state_dict(arrays.to_torch_state_dict())
        packages = dict(flwr="", ray="Ray ", torch="PyTorch ")
        version = ", ".join(title + importlib.metadata.version(package) for package, title in packages.items())
        workload.report("Flower", version, name, seconds, torch_model.loss(network, *test))

    return app


def main(name):
    work = workload.WORKLOADS[name]
    x, y, *test = workload.data(work.clients)
    ray = dict(num_cpus=2, include_dashboard=False, object_store_memory=2**28, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        np.save(folder / "x.npy", x)
        np.save(folder / "y.npy", y)
        del x, y
        backend = dict(init_args=ray, client_resources=dict(num_cpus=1, num_gpus=0.0))
        run_simulation(server(name, test), client(work.model, folder), work.clients, backend_config=backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
