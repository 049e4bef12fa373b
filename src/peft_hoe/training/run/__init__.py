"""What all trainers of routers share: the router that trains, its run, its checkpoints, what is logged."""
