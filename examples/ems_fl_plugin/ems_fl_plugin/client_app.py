"""An ordinary training function; the mod makes it one of EMS-FL."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from ems_fl_plugin.task import NUM_CLUSTERS, Net, layout, load_data
from flwr_moe.client_apps import answer_gate_statistics, expert_mod
from flwr_moe.network import answer_roll_call

app = ClientApp(mods=[expert_mod(layout())])


def site(context: Context) -> int:
    """Return the cluster a node belongs to."""
    return int(context.node_config["partition-id"]) % NUM_CLUSTERS


@app.train("experts")
def train(message: Message, context: Context) -> Message:
    """Train a full state dict, as with FedAvg."""
    model, data = Net(), load_data(site(context))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    config = message.content["config"]
    optimiser = torch.optim.Adam(model.parameters(), lr=config["learning-rate"])
    for _ in range(config["local-steps"]):
        loss = torch.nn.functional.cross_entropy(model(data.x), data.y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    metrics = MetricRecord({"num-examples": len(data), "train-loss": float(loss.detach())})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


answer_gate_statistics(app, lambda _: Net(), lambda context: load_data(site(context)), 3)
answer_roll_call(app, site=site)
