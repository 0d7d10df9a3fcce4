// The identity over shared memory: argo-streams conform --transport shm -- node identity.js
'use strict';
const { open } = require('argo-streams');

async function main() {
  const stage = open();
  for await (const batch of stage.batches()) { // or: for await (const record of stage) await stage.emit(record.payload)
    for (const record of batch) await stage.emit(record.payload);
  }
  await stage.close();
}

main().catch((error) => {
  console.error(`identity: ${error.message}`);
  process.exitCode = 1;
});
