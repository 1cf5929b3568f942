"""pfl-research's federated averaging on the workload: python with_pfl.py W1 [processes].

Processes of one thread each, under torchrun where a number of them is given.
"""

import importlib.metadata
import itertools
import os
import sys

import torch
import torch.distributed.run
import torch_model
import workload
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel


def main(name):
    torch.set_num_threads(1)
    work = workload.WORKLOADS[name]
    x, y, *test = workload.data(work.clients)
    x, y = torch.from_numpy(x), torch.from_numpy(y).long()
    clients = [PyTorchTensorDataset((x[i], y[i])) for i in range(work.clients)]
    order = None
    data = FederatedDataset(clients.__getitem__, lambda: next(order))
    network = torch_model.initial(work.model)
    network.metrics = lambda x, y: {}
    model = PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), 1.0))
    algorithm, backend = FederatedAveraging(), SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()])
    training = NNTrainHyperParams(local_batch_size=workload.BATCH, local_num_epochs=1, local_learning_rate=workload.RATE)

    def one(number):
        nonlocal order
        order = itertools.cycle(workload.cohort(number, work))  # every process draws all, at the end some too many
        rounds = NNAlgorithmParams(number + 1, evaluation_frequency=sys.maxsize, train_cohort_size=work.cohort, val_cohort_size=None)
        algorithm.run(rounds, backend, model, training, NNEvalHyperParams(local_batch_size=None), send_metrics_to_platform=False)

    seconds = workload.timed(one, work, lambda: None)
    if torch.distributed.is_initialized():  # who leaves first would take the other's connection
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        version = f"{importlib.metadata.version('pfl')}, PyTorch {torch.__version__}"
        peer = f"pfl-research, {processes} process{'es' * (processes > 1)}"
        workload.report(peer, version, name, seconds, torch_model.loss(network, *test))


if __name__ == "__main__":
    name, *processes = sys.argv[1:]
    if processes:
        torch.distributed.run.main(["--standalone", "--nproc-per-node", *processes, __file__, name])
    else:
        main(name)
