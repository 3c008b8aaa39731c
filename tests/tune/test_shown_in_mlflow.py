import pytest

from lrmc_ray.tune.command import in_mlflow

CHART = "    forgetting against gain: {}/#/experiments/1"


@pytest.mark.parametrize(
    ("uri", "start", "page"),
    [
        ("sqlite:///runs/mlflow.db", "/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db",
         "http://127.0.0.1:5000"),
        ("postgresql://***@db/mlflow",
         "/mlflow ui --backend-store-uri 'postgresql://***@db/mlflow'", "http://127.0.0.1:5000"),
        ("http://10.0.0.7:8080", "MLflow: http://10.0.0.7:8080", "http://10.0.0.7:8080"),
        ("https://ml.example/base/", "MLflow: https://ml.example/base", "https://ml.example/base"),
    ],
)  # fmt: skip
def test_a_server_has_a_page_and_a_database_is_given_one(uri, start, page):
    first, second = in_mlflow(uri, "#/experiments/1")
    # The program is called by its path where it is not the first one in PATH.
    assert f"/{first}".endswith(start)
    assert second == CHART.format(page)
    assert in_mlflow(uri, None) == [first]
