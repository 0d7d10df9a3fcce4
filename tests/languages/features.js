// What conform does not try: attributes, several inputs, an interrupted wait, bytes that are kept too long, and that the event loop goes on
// while the stage waits. tests/languages.rs runs it.
'use strict';
const fs = require('node:fs');
const { open } = require('argo-streams');

async function one(stage) {
  const records = stage[Symbol.asyncIterator]();
  setTimeout(() => stage.interrupt(), 1);
  try {
    await records.next();
  } catch (error) {
    if (error.code !== 'AGS_INTERRUPTED') throw error;
    fs.writeFileSync(process.argv[2], '');
  }
  const how = { key: 'k', eventTimeNs: 5n, attributes: { hop: 'one', empty: '' } };
  const inputs = new Set();
  let kept = null, first = null, refused = 0;
  for await (const record of stage) {
    inputs.add(record.input);
    if (kept === null) [kept, first] = [record.payload, record];
    else {
      if (kept.length === 0) refused++;
      try {
        first.key;
      } catch (error) {
        if (error.code === 'AGS_STATE') refused++;
      }
    }
    await stage.emit(record.payload, how);
  }
  await stage.emit(`inputs ${inputs.size} kept ${refused === 4 ? 'refused' : refused}`, how);
}

async function other(stage) {
  for await (const record of stage) {
    const empty = record.attribute('empty');
    const words = [record.attribute('hop'), empty !== null && empty.length === 0, record.attribute('missing') === null, record.key, record.eventTimeNs, record.payload];
    await stage.emit(words.join(' '));
  }
}

async function fails(stage) {
  for await (const record of stage) {
    if (record.attempts < parseInt(record.payload, 10)) await stage.fail('not today');
    else await stage.emit(record.payload);
  }
}

async function main() {
  const stage = open();
  await ({ one, fails }[stage.name] ?? other)(stage);
  await stage.close();
}

main().catch((error) => {
  console.error(`features: ${error.stack}`);
  process.exit(1);
});
