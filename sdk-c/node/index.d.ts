/** A Node.js program as a step of an Argo Streams pipeline, over shared memory. */
export type Bytes = Uint8Array | string;

export class AgsError extends Error {
  /** Its number in argo_streams.h. */
  readonly status: number;
  /** Its name there, such as 'AGS_INTERRUPTED'. */
  readonly code: string;
}

/** Good until the loop asks for the next one. */
export class Record {
  /** Shared memory: never write to it, and copy what is needed longer. */
  readonly payload: Buffer;
  readonly key: Buffer | null;
  readonly eventTimeNs: bigint;
  readonly position: bigint;
  readonly input: number;
  /** How often it failed before. */
  readonly attempts: number;
  attribute(name: string): Buffer | null;
}

export interface EmitOptions {
  /** null: no key; left out: that of the record of the loop. */
  key?: Bytes | null;
  eventTimeNs?: bigint;
  attributes?: { [name: string]: Bytes };
  /** To the error output. */
  errors?: boolean;
}

export class Stage implements AsyncIterable<Record> {
  readonly name: string;
  [Symbol.asyncIterator](): AsyncIterator<Record>;
  batches(): AsyncIterable<Iterable<Record>>;
  /** A promise when there is no room: await it. */
  emit(payload: Bytes, options?: EmitOptions): Promise<void> | undefined;
  reject(reason: string): Promise<void> | undefined;
  /** Await it; before anything was emitted or put for the record. */
  fail(reason: string): Promise<void>;
  get(key: Bytes): Buffer | null;
  put(key: Bytes, value: Bytes): void;
  delete(key: Bytes): void;
  items(): IterableIterator<[Buffer, Buffer]>;
  interrupt(): void;
  close(): Promise<void>;
}

export function open(socketPath?: string | null): Stage;
