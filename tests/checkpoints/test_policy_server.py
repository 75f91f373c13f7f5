"""LeRobot's policy server, over gRPC on the loopback, with a student's checkpoint as people have one."""

import pickle
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from helpers import reflow_train_main
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import send_bytes_in_chunks
from people import BASE_CAMERAS, ROBOT_DIM, People, dataset_flags

from smolvla_reflow.demo.flags import LAST
from smolvla_reflow.evaluation.storing import write_num_steps

SIZE = 256  # of the checkpoint's images, so that the server has nothing to resize
CAMERAS = BASE_CAMERAS[:2]
JOINTS = [f"joint_{i}.pos" for i in range(ROBOT_DIM)]
TASK, OBSERVED_AT = "pick the cube", 7


@pytest.fixture(scope="module")
def student(people: People, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned from a base, cameras renamed, reflowed, and two steps stored in its config.json."""
    run = tmp_path_factory.mktemp("student") / "run"
    reflow_train_main([f"--reflow.teacher_path={people.teacher}", *dataset_flags(people.dataset, output_dir=run)])
    write_num_steps(run / LAST, 2)
    return run / LAST


@pytest.fixture
def client(tmp_path, monkeypatch) -> Iterator[services_pb2_grpc.AsyncInferenceStub]:
    """A client of a new server, which LeRobot's `policy_server` would serve in the same way."""
    monkeypatch.chdir(tmp_path)  # the server writes its log into the working directory
    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.policy_server import PolicyServer

    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    policy_server = PolicyServer(PolicyServerConfig(host="127.0.0.1", port=8080, inference_latency=0.0))
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(policy_server, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield services_pb2_grpc.AsyncInferenceStub(channel)
    server.stop(None)


def what_the_robot_sees() -> dict:
    rng = np.random.default_rng(0)
    images = {
        name.removeprefix("observation.images."): rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8) for name in CAMERAS
    }
    return {**dict(zip(JOINTS, rng.uniform(-1, 1, ROBOT_DIM).tolist(), strict=True)), **images, "task": TASK}


def test_the_server_gives_the_stock_chunk_of_the_stored_number_of_steps(student, client):
    from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation

    image = {"dtype": "image", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    state = {"dtype": "float32", "shape": (ROBOT_DIM,), "names": JOINTS}
    features = {"observation.state": state, **dict.fromkeys(CAMERAS, image)}
    setup = RemotePolicyConfig("smolvla", str(student), features, actions_per_chunk=4, device="cpu")
    seen = what_the_robot_sees()
    observation = TimedObservation(time.time(), OBSERVED_AT, observation=seen, must_go=True)

    client.Ready(services_pb2.Empty())
    client.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(setup)))
    client.SendObservations(send_bytes_in_chunks(pickle.dumps(observation), services_pb2.Observation))
    torch.manual_seed(0)
    actions = pickle.loads(client.GetActions(services_pb2.Empty()).data)

    policy = SmolVLAPolicy.from_pretrained(student).eval()
    before, after = make_pre_post_processors(policy.config, str(student))
    batch = {
        "observation.state": torch.tensor([[seen[name] for name in JOINTS]]),
        **{name: torch.tensor(seen[name.rpartition(".")[2]]).permute(2, 0, 1)[None] / 255 for name in CAMERAS},
        "task": TASK,
    }

    def chunk(num_steps: int) -> torch.Tensor:
        policy.config.num_steps = num_steps
        torch.manual_seed(0)
        drawn = policy.predict_action_chunk(before(dict(batch)))[0]
        return torch.stack([after(action[None])[0] for action in drawn])

    assert policy.config.num_steps == 2
    found = torch.stack([action.get_action() for action in actions])
    torch.testing.assert_close(found, chunk(2), rtol=1e-5, atol=1e-6)
    assert (found - chunk(10)).abs().max() > 1e-3  # or the number of steps would not show
    assert [action.get_timestep() for action in actions] == [OBSERVED_AT + i for i in range(4)]
