"""The one changed line is the strategy."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from ems_fl_plugin.task import Net, layout
from flwr_moe.strategies import EMSFL

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the experts of two clusters."""
    config = context.run_config
    strategy = EMSFL(layout(), num_inputs=13, num_features=128)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord(
            {
                "local-steps": config["local-steps"],
                "learning-rate": config["learning-rate"],
                "batch-size": 32,
            }
        ),
    )
    for cluster in strategy.clusters:
        print(f"cluster {cluster.site} owns {cluster.experts}, {len(cluster.uploads_s)} uploads")
    print(f"{len(result.arrays)} tensors trained")
