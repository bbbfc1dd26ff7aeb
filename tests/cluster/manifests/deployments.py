"""A deployment to render: some CPUs on the head, two pools, a key and an odd variable."""

from cluster.manifests.deployment import FILE_PATH, Deployment, MachineGroup

FILE = "name: a\nwords: '$HOME `x`'\n"


def deployment(**changes) -> Deployment:
    settings = {
        "name": "Run_1.3b",
        "program": ("prog", "run", FILE_PATH, "--say", "a b"),
        "file": FILE,
        "head": MachineGroup("head", 1, 9, 1, 64, {"sgmd-pool": "head"}),
        "workers": [
            MachineGroup("learn", 2, 32, 8, 1600, {"sgmd-pool": "learn"}),
            MachineGroup("fake-score", 1, 8, 4, 800, {"sgmd-pool": "fake-score"}, {"h100": 4.0}),
        ],
        "ray_version": "2.60.0",
        "image": "sgmd:1",
        "environment": {"AWS_ENDPOINT_URL": "http://a b/'c'"},
        "secrets": ["AWS_SECRET_ACCESS_KEY"],
        "stop_after_s": 300,
        "made_by": "Made by: a test",
        **changes,
    }
    return Deployment(**settings)


def equals(nodes: int) -> Deployment:
    """A deployment on machines that are all equal."""
    head = MachineGroup("head", 1, 9, 2, 64)
    workers = [MachineGroup("worker", nodes - 1, 9, 2, 64)] if nodes > 1 else []
    return deployment(head=head, workers=workers)
