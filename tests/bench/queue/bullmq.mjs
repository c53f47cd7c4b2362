// Measures BullMQ: bulk adds of 300-byte payloads, then a worker that answers at once, results kept.
// Arguments: the url of a Redis, the number of jobs. Prints one line of JSON.
import { createRequire } from "node:module";
import { Queue, Worker } from "bullmq";
import { Redis } from "ioredis";

const [url, count] = process.argv.slice(2);
const jobs = Number(count);
const { hostname: host, port } = new URL(url);
const connection = { host, port: Number(port) };
const version = createRequire(import.meta.url)("bullmq/package.json").version;

const queue = new Queue("bench", { connection });
await queue.waitUntilReady();
const redis = new Redis(connection);
const number = (info, name) => Number(new RegExp(`^${name}:(.*)$`, "m").exec(info)[1]);
const spent = async () => {
  const info = await redis.info();
  return {
    us: (number(info, "used_cpu_user") + number(info, "used_cpu_sys")) * 1e6,
    bytes: number(info, "used_memory"),
  };
};

const empty = await spent();
const data = { prompt: "x".repeat(300) };
const batch = Array.from({ length: 1000 }, () => ({ name: "job", data }));
let begun = performance.now();
for (let added = 0; added < jobs; added += 4 * batch.length) {
  await Promise.all([1, 2, 3, 4].map(() => queue.addBulk(batch)));
}
const addSeconds = (performance.now() - begun) / 1e3;
const queued = await spent();
const total = Math.ceil(jobs / (4 * batch.length)) * 4 * batch.length;

begun = performance.now();
let done = 0;
await new Promise((resolve) => {
  const worker = new Worker("bench", async () => "a move", { connection, concurrency: 500 });
  worker.on("completed", () => {
    if (++done === total) worker.close(true).then(resolve);
  });
});
const drainSeconds = (performance.now() - begun) / 1e3;
const after = await spent();

console.log(JSON.stringify({
  version,
  add_per_s: total / addSeconds,
  drain_per_s: total / drainSeconds,
  life_per_s: total / (addSeconds + drainSeconds),
  redis_us: (after.us - empty.us) / total,
  queued_bytes: (queued.bytes - empty.bytes) / total,
}));
process.exit(0);
