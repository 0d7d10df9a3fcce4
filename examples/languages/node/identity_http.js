// The identity over HTTP: argo-streams conform --transport http -- node identity_http.js
'use strict';
const http = require('node:http');

http.createServer((request, response) => {
  if (request.method === 'GET') return response.end(); // GET /ready
  const parts = [];
  request.on('data', (part) => parts.push(part));
  request.on('end', () => {
    const body = Buffer.concat(parts);
    response.writeHead(201, { 'Content-Length': body.length });
    response.end(body);
  });
}).listen(Number(process.env.PORT), '127.0.0.1');
