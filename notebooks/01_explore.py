# Databricks notebook source
# MAGIC %md
# MAGIC # The tables after a night
# MAGIC Walks through what the nightly job left behind: the books of what arrived, the rejected payloads, the item
# MAGIC embeddings in two dimensions, and one user's window and list. It reads; it changes nothing.
# MAGIC
# MAGIC On Databricks the widget `settings` names the settings files and overlays, separated by commas. Elsewhere run
# MAGIC `NIGHTSTREAM_SETTINGS=movielens,mine.yaml python notebooks/01_explore.py`; pictures then go to the folder of
# MAGIC NIGHTSTREAM_PLOTS, if that is set.

# COMMAND ----------

import os
from pathlib import Path

import numpy as np
import plotly.express as px
from pyspark.sql import functions as F

from nightstream.ingest import ledger
from nightstream.store import registry
from nightstream.runtime import session
from nightstream.runtime import settings as configuration
from nightstream.monitoring.freshness import freshness, summary
from nightstream.store.storage import Storage
from nightstream.store.tables import (
    EVENTS,
    ITEM_EMBEDDINGS,
    ITEMS,
    QUARANTINE,
    RECOMMENDATIONS,
    USER_VECTORS,
)

if "dbutils" in globals():
    dbutils.widgets.text("settings", "databricks")  # noqa: F821
    files = dbutils.widgets.get("settings").split(",")  # noqa: F821
else:
    files = os.environ.get("NIGHTSTREAM_SETTINGS", "movielens").split(",")

overrides = [o for o in os.environ.get("NIGHTSTREAM_SET", "").split(";") if o]
settings = configuration.load(files, overrides)
spark = session.build(settings.spark, "nightstream exploration")
storage = Storage(spark, settings.storage)
plots = os.environ.get("NIGHTSTREAM_PLOTS")
show = globals().get("display", lambda frame: frame.show(20, truncate=60))

# COMMAND ----------

# MAGIC %md
# MAGIC ## What arrived
# MAGIC Every payload is kept in `raw_events`, and ends in exactly one of `events`, `quarantine` and `duplicates`.

# COMMAND ----------

print(ledger.check(storage))
events = storage.read(EVENTS)
show(events.groupBy("event_type").agg(F.count("*").alias("events"), F.countDistinct("user_id").alias("users")))
show(events.groupBy(F.window("event_time", "30 days").start.alias("from")).count().orderBy("from"))

# COMMAND ----------

# MAGIC %md
# MAGIC ## What was rejected, and why

# COMMAND ----------

show(storage.read(QUARANTINE).groupBy("reason", "field").count().orderBy(F.desc("count")))

# COMMAND ----------

# MAGIC %md
# MAGIC ## The model that serves

# COMMAND ----------

model = registry.published(storage)
print(model.model_version, model.status, model.at)
for name, value in sorted(model.metrics.items()):
    print(f"  {name} = {value:.4g}")

# COMMAND ----------

# MAGIC %md
# MAGIC ## How fresh the lists are
# MAGIC Against the newest event of each user that counts; a list that has taken up everything has age 0.

# COMMAND ----------

for name, value in summary(freshness(storage, settings)).items():
    print(f"  {name} = {value:.4g}")

# COMMAND ----------

# MAGIC %md
# MAGIC ## The item embeddings in two dimensions
# MAGIC The two directions in which the vectors vary most (principal components), coloured by an item's first category.

# COMMAND ----------

first_category = F.get(F.flatten(F.map_values("categories")), F.lit(0))
embedded = (
    storage.read(ITEM_EMBEDDINGS)
    .where(F.col("model_version") == model.model_version)
    .join(storage.read(ITEMS), "item_id", "left")
    .select("item_id", F.coalesce("title", "item_id").alias("title"), first_category.alias("category"), "vector")
    .orderBy("item_id")
    .limit(5000)
    .toPandas()
)
vectors = np.stack(embedded["vector"].to_list())
centred = vectors - vectors.mean(axis=0)
directions = np.linalg.svd(centred, full_matrices=False)[2][:2]
plane = centred @ directions.T
share = (plane**2).sum() / max((centred**2).sum(), 1e-12)
figure = px.scatter(
    x=plane[:, 0],
    y=plane[:, 1],
    color=embedded["category"].fillna("none"),
    hover_name=embedded["title"],
    title=f"{len(plane)} item embeddings; two dimensions hold {share:.0%} of their variance",
    labels={"x": "first component", "y": "second component", "color": "category"},
)
if plots:
    Path(plots).mkdir(parents=True, exist_ok=True)
    figure.write_html(str(Path(plots) / "item_embeddings.html"))
elif "dbutils" in globals():
    figure.show()
print(figure.layout.title.text)

# COMMAND ----------

# MAGIC %md
# MAGIC ## One user: what the model sees, and what it recommends

# COMMAND ----------

longest = storage.read(USER_VECTORS).orderBy(F.desc(F.size("window")), "user_id").limit(1)
user_id = longest.first().user_id
titles = storage.read(ITEMS).select("item_id", "title")
window = longest.select(F.explode("window").alias("event")).select("event.*").join(titles, "item_id", "left")
print(f"user {user_id}: the newest events of the window")
show(window.select("event_time", "event_type", "item_id", "title").orderBy(F.desc("event_time"), F.desc("event_id")))

# COMMAND ----------

recommended = storage.read(RECOMMENDATIONS).where(F.col("user_id") == user_id).join(titles, "item_id", "left")
show(recommended.select("rank", "item_id", "title", "score", "strategy", "reason").orderBy("rank"))
