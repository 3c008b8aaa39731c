"""A study for people: table, figures, HTML page, model card, MLflow."""
