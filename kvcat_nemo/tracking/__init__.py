"""Where a run's figures go: a JSON-lines file beside the checkpoints, and MLflow. Knows no trainer and no NeMo."""
