// Builds the addon against the static C library, with the C compiler ($CC, cc) and Node's header of N-API, which lies beside Node (Debian:
// the package libnode-dev), or in npm's setting nodedir.
// AGS_SDK_DIR names a folder with argo_streams.h and libargo_streams.a; without it they come from the checkout that this file lies in, or
// from where `make sdk-install` put them, by pkg-config.
'use strict';
const { execFileSync, spawnSync } = require('node:child_process');
const fs = require('node:fs');
const path = require('node:path');

function places() {
  if (process.env.AGS_SDK_DIR) return [[process.env.AGS_SDK_DIR, process.env.AGS_SDK_DIR]];
  const found = [[path.join(__dirname, '../include'), path.join(__dirname, '../../target/release')]];
  try {
    const ask = (what) => execFileSync('pkg-config', [`--variable=${what}`, 'argo-streams'], { stdio: ['ignore', 'pipe', 'ignore'] }).toString().trim();
    found.push([ask('includedir'), ask('libdir')]);
  } catch { /* not installed there */ }
  return found;
}

const looked = places();
const place = looked.find(([include, library]) => fs.existsSync(path.join(include, 'argo_streams.h')) && fs.existsSync(path.join(library, 'libargo_streams.a')));
if (!place) {
  const words = looked.map((pair) => pair.join(' and ')).join(', ');
  console.error(`argo-streams: no argo_streams.h with libargo_streams.a in ${words}. Build it in the checkout (cargo build --release -p argo-streams-sdk-c), or install it (make sdk-install), or name its folder by AGS_SDK_DIR.`);
  process.exit(1);
}
const folders = [process.env.npm_config_nodedir, path.join(path.dirname(fs.realpathSync(process.execPath)), '..')].filter(Boolean).map((folder) => path.join(folder, 'include/node'));
const headers = folders.find((folder) => fs.existsSync(path.join(folder, 'node_api.h')));
if (!headers) {
  console.error(`argo-streams: no node_api.h in ${folders.join(', ')}. Install Node's headers (Debian: apt-get install libnode-dev), or name Node's prefix: npm install --nodedir=PREFIX.`);
  process.exit(1);
}
fs.mkdirSync(path.join(__dirname, 'native'), { recursive: true });
const built = spawnSync(process.env.CC || 'cc', [
  '-std=c11', '-O2', '-Wall', '-Wextra', '-Wno-unused-parameter', '-Wno-missing-field-initializers', '-shared', '-fPIC', '-DNAPI_VERSION=8',
  `-I${headers}`, `-I${place[0]}`, '-o', path.join(__dirname, 'native/argo_streams.node'), path.join(__dirname, 'addon.c'),
  path.join(place[1], 'libargo_streams.a'), '-lgcc_s', '-lpthread', '-ldl', '-lm',
], { stdio: 'inherit' });
if (built.error) console.error(`argo-streams: no C compiler: ${built.error.message}`);
process.exit(built.status ?? 1);
