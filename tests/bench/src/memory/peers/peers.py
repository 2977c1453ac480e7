"""One vector store beside ours: python peers.py NAME FOLDER

FOLDER holds vectors.f32 and queries.f32 (little-endian, 384 numbers each, length 1) and agents.u32 (whose vector each
is); FOLDER/disk is where the store may write. A query asks for the ten nearest of one agent: query i is of agent
i modulo the number of agents. Prints one line of JSON. Each store has the settings that its documentation gives for
exactness and durability at this size.
"""

import json
import os
import sys
import time

import numpy

DIMENSION = 384
K = 10
WRITES = 50
BATCH = 4000


def read(folder):
    load = lambda name, kind: numpy.fromfile(os.path.join(folder, name), dtype=kind)
    vectors = load("vectors.f32", "<f4").reshape(-1, DIMENSION)
    queries = load("queries.f32", "<f4").reshape(-1, DIMENSION)
    return vectors, queries, load("agents.u32", "<u4").astype(numpy.int64)


def at(times, share):
    return sorted(times)[int((len(times) - 1) * share)] * 1e3


def measure(name, vectors, queries, agents, store):
    """store: add(numbers), search(agent, query) -> numbers, write(number, vector, agent), version"""
    count = int(agents.max()) + 1
    begun = time.monotonic()
    store.build(vectors, agents)
    build_s = time.monotonic() - begun
    store.search(0, queries[0])
    times, found, wanted = [], 0, 0
    for i, query in enumerate(queries):
        agent = i % count
        begun = time.monotonic()
        hits = store.search(agent, query)
        times.append(time.monotonic() - begun)
        own = numpy.nonzero(agents == agent)[0]
        exact = own[numpy.argsort(-(vectors[own] @ query), kind="stable")[:K]]
        found += len(set(map(int, hits)) & set(map(int, exact)))
        wanted += len(exact)
    writes = []
    for i in range(WRITES if store.durability else 0):
        begun = time.monotonic()
        store.write(len(vectors) + i, vectors[i] * 1.0, i % count)
        writes.append(time.monotonic() - begun)
    print(json.dumps({
        "name": name, "version": store.version, "build_s": build_s, "exactness": found / wanted,
        "search_p50_ms": at(times, 0.5), "search_p99_ms": at(times, 0.99),
        "write_p50_ms": at(writes, 0.5) if writes else None, "write_p99_ms": at(writes, 0.99) if writes else None,
        "durability": store.durability or "",
    }))


def sync(path):
    for name in (path, os.path.dirname(path)):
        handle = os.open(name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


class Usearch:
    """An HNSW graph for each agent, in f16, as wide as gave exact answers; its Python binding takes no filter."""

    durability = "an agent's whole file written and synced"

    def __init__(self, disk):
        import usearch
        from usearch.index import Index
        self.version, self.disk, self.graphs, self.kind = usearch.__version__, disk, {}, Index

    def graph(self, agent):
        if agent not in self.graphs:
            self.graphs[agent] = self.kind(ndim=DIMENSION, metric="ip", dtype="f16", connectivity=16,
                                           expansion_add=128, expansion_search=128)
        return self.graphs[agent]

    def build(self, vectors, agents):
        for agent in range(int(agents.max()) + 1):
            own = numpy.nonzero(agents == agent)[0]
            self.graph(agent).add(own.astype(numpy.uint64), vectors[own])

    def search(self, agent, query):
        return self.graph(agent).search(query, K).keys

    def write(self, number, vector, agent):
        graph, path = self.graph(agent), os.path.join(self.disk, f"{agent}.usearch")
        graph.add(numpy.uint64(number), vector)
        graph.save(path + ".new")
        sync(path + ".new")
        os.rename(path + ".new", path)
        sync(path)


class UsearchShared(Usearch):
    """One HNSW graph of all agents: the nearest of all are asked for until ten are the agent's."""

    # Not tried: for one vector the whole file of all agents would be written.
    durability = None

    def build(self, vectors, agents):
        self.agents = agents
        self.graph(0).add(numpy.arange(len(vectors), dtype=numpy.uint64), vectors)

    def search(self, agent, query):
        most, all_of = K * 32, len(self.agents)
        while True:
            keys = self.graph(0).search(query, min(most, all_of)).keys
            own = [key for key in keys if self.agents[int(key)] == agent][:K]
            if len(own) == K or most >= all_of:
                return own
            most *= 4


class SqliteVec:
    """Exact, one partition for each agent; WAL and synchronous FULL."""

    durability = "a transaction, synchronous=FULL"

    def __init__(self, disk):
        # Python's own may be built without extensions.
        import pysqlite3 as sqlite3
        import sqlite_vec
        self.db = sqlite3.connect(os.path.join(disk, "vec.db"))
        self.db.enable_load_extension(True)
        sqlite_vec.load(self.db)
        self.version = self.db.execute("select vec_version()").fetchone()[0]
        self.db.execute("pragma journal_mode=wal")
        self.db.execute("pragma synchronous=full")
        self.db.execute(f"create virtual table v using vec0(agent integer partition key, e float[{DIMENSION}])")

    def build(self, vectors, agents):
        rows = ((int(i), int(agents[i]), vectors[i].tobytes()) for i in range(len(vectors)))
        self.db.executemany("insert into v(rowid, agent, e) values (?, ?, ?)", rows)
        self.db.commit()

    def search(self, agent, query):
        asked = "select rowid from v where e match ? and k = ? and agent = ?"
        return [row[0] for row in self.db.execute(asked, (query.tobytes(), K, int(agent)))]

    def write(self, number, vector, agent):
        row = (int(number), int(agent), vector.astype("<f4").tobytes())
        self.db.execute("insert into v(rowid, agent, e) values (?, ?, ?)", row)
        self.db.commit()


class Lancedb:
    """Exact, filtered before the search by a bitmap index of the agent."""

    durability = "one version of the table; whether it is synced is not documented"

    def __init__(self, disk):
        import lancedb
        self.version, self.db = lancedb.__version__, lancedb.connect(disk)

    @staticmethod
    def rows(numbers, agents, vectors):
        import pyarrow
        flat = pyarrow.array(numpy.ascontiguousarray(vectors, dtype="<f4").reshape(-1))
        lists = pyarrow.FixedSizeListArray.from_arrays(flat, DIMENSION)
        return pyarrow.table({"number": pyarrow.array(numbers), "agent": pyarrow.array(agents), "vector": lists})

    def build(self, vectors, agents):
        self.table = self.db.create_table("v", self.rows(numpy.arange(len(vectors)), agents, vectors))
        self.table.create_scalar_index("agent", index_type="BITMAP")

    def search(self, agent, query):
        asked = self.table.search(query).distance_type("dot").where(f"agent = {agent}", prefilter=True)
        return asked.select(["number"]).limit(K).to_arrow()["number"].to_pylist()

    def write(self, number, vector, agent):
        self.table.add(self.rows(numpy.array([number]), numpy.array([agent]), vector[None, :]))


class Chromadb:
    """One HNSW graph, filtered by a field; wide enough for the filter."""

    durability = "an add that returned; its SQLite syncs as it is set up by default"

    def __init__(self, disk):
        import chromadb
        from chromadb.config import Settings
        client = chromadb.PersistentClient(disk, settings=Settings(anonymized_telemetry=False))
        self.version = chromadb.__version__
        setup = {"hnsw": {"space": "ip", "ef_construction": 128, "ef_search": 128, "max_neighbors": 16}}
        self.all = client.create_collection("vectors", configuration=setup, embedding_function=None)

    def build(self, vectors, agents):
        for begin in range(0, len(vectors), BATCH):
            numbers = range(begin, min(begin + BATCH, len(vectors)))
            fields = [{"agent": int(agents[i])} for i in numbers]
            self.all.add([str(i) for i in numbers], embeddings=vectors[list(numbers)], metadatas=fields)

    def search(self, agent, query):
        asked = self.all.query(query_embeddings=[query], n_results=K, where={"agent": int(agent)}, include=[])
        return [int(number) for number in asked["ids"][0]]

    def write(self, number, vector, agent):
        self.all.add([str(number)], embeddings=[vector], metadatas=[{"agent": int(agent)}])


PEERS = {"usearch, a graph for each agent": Usearch, "usearch, one graph": UsearchShared,
         "sqlite-vec": SqliteVec, "lancedb": Lancedb, "chromadb": Chromadb}

if __name__ == "__main__":
    name, folder = sys.argv[1:3]
    disk = os.path.join(folder, "disk")
    os.makedirs(disk, exist_ok=True)
    measure(name, *read(folder), PEERS[name](disk))
