PRAGMA journal_mode=WAL;
PRAGMA foreign_keys=OFF;
BEGIN TRANSACTION;
CREATE TABLE adapters (
	adapter_id INTEGER NOT NULL, 
	tenant VARCHAR(128) NOT NULL, 
	user_id VARCHAR(128) NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	base VARCHAR(255) NOT NULL, 
	last_version INTEGER NOT NULL, 
	live_version INTEGER, 
	created_at VARCHAR(32) NOT NULL, 
	CONSTRAINT pk_adapters PRIMARY KEY (adapter_id), 
	CONSTRAINT uq_adapters_tenant_user_id_name_base UNIQUE (tenant, user_id, name, base), 
	CONSTRAINT fk_adapters_tenant_user_id FOREIGN KEY(tenant, user_id) REFERENCES users (tenant, user_id)
);
INSERT INTO "adapters" VALUES(1,'default','alice','default','tiny@1',2,1,'2026-11-24T09:04:03.240166Z');
CREATE TABLE live_history (
	entry_id INTEGER NOT NULL, 
	adapter_id INTEGER NOT NULL, 
	version INTEGER NOT NULL, 
	created_at VARCHAR(32) NOT NULL, 
	CONSTRAINT pk_live_history PRIMARY KEY (entry_id), 
	CONSTRAINT fk_live_history_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (adapter_id)
);
INSERT INTO "live_history" VALUES(1,1,1,'2026-11-24T09:04:03.249204Z');
INSERT INTO "live_history" VALUES(2,1,2,'2026-11-24T09:04:03.260106Z');
INSERT INTO "live_history" VALUES(3,1,1,'2026-11-24T09:04:03.263089Z');
CREATE TABLE tenants (
	tenant VARCHAR(128) NOT NULL, 
	created_at VARCHAR(32) NOT NULL, 
	CONSTRAINT pk_tenants PRIMARY KEY (tenant)
);
INSERT INTO "tenants" VALUES('default','2026-11-24T09:04:03.240166Z');
CREATE TABLE upload_keys (
	adapter_id INTEGER NOT NULL, 
	"key" VARCHAR(255) NOT NULL, 
	request_sha256 VARCHAR(64) NOT NULL, 
	version INTEGER NOT NULL, 
	was_new BOOLEAN NOT NULL, 
	was_live BOOLEAN NOT NULL, 
	created_at VARCHAR(32) NOT NULL, 
	CONSTRAINT pk_upload_keys PRIMARY KEY (adapter_id, "key"), 
	CONSTRAINT fk_upload_keys_adapter_id_version FOREIGN KEY(adapter_id, version) REFERENCES versions (adapter_id, version) ON DELETE CASCADE
);
INSERT INTO "upload_keys" VALUES(1,'k1','080a9ed428559ef602668b4c00f114f1a11c3f6b02a435f0bdc154578e4d7f22',1,1,1,'2999-01-01T00:00:00.000000Z');
INSERT INTO "upload_keys" VALUES(1,'k2','038966de9f6b9a901b20b4c6ca8b2a46009feebe031babc842d43690c0bc222b',2,1,1,'2999-01-01T00:00:00.000000Z');
CREATE TABLE users (
	tenant VARCHAR(128) NOT NULL, 
	user_id VARCHAR(128) NOT NULL, 
	fallback VARCHAR(16), 
	limits JSON NOT NULL, 
	metadata JSON NOT NULL, 
	created_at VARCHAR(32) NOT NULL, 
	CONSTRAINT pk_users PRIMARY KEY (tenant, user_id), 
	CONSTRAINT fk_users_tenant FOREIGN KEY(tenant) REFERENCES tenants (tenant)
);
INSERT INTO "users" VALUES('default','alice',NULL,'{}','{}','2026-11-24T09:04:03.240166Z');
CREATE TABLE versions (
	adapter_id INTEGER NOT NULL, 
	version INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	object_key VARCHAR(512) NOT NULL, 
	config_sha256 VARCHAR(64) NOT NULL, 
	weights_sha256 VARCHAR(64) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	rank INTEGER NOT NULL, 
	target_modules JSON NOT NULL, 
	metadata JSON NOT NULL, 
	warnings JSON NOT NULL, 
	created_at VARCHAR(32) NOT NULL, 
	CONSTRAINT pk_versions PRIMARY KEY (adapter_id, version), 
	CONSTRAINT fk_versions_adapter_id FOREIGN KEY(adapter_id) REFERENCES adapters (adapter_id), 
	CONSTRAINT uq_versions_object_key UNIQUE (object_key)
);
INSERT INTO "versions" VALUES(1,1,'0000000000000000000000000000000000000000000000000000000000000001','default/1','cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc','0000000000000000000000000000000000000000000000000000000000000001',101,8,'["q_proj", "v_proj"]','{"run": 1}','["odd"]','2026-11-24T09:04:03.247997Z');
INSERT INTO "versions" VALUES(1,2,'0000000000000000000000000000000000000000000000000000000000000002','default/2','cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc','0000000000000000000000000000000000000000000000000000000000000002',102,8,'["q_proj", "v_proj"]','{"run": 2}','["odd"]','2026-11-24T09:04:03.259614Z');
CREATE INDEX ix_versions_digest ON versions (digest);
CREATE INDEX ix_live_history_adapter_id_entry_id ON live_history (adapter_id, entry_id);
CREATE INDEX ix_upload_keys_adapter_id_version ON upload_keys (adapter_id, version);
CREATE INDEX ix_upload_keys_created_at ON upload_keys (created_at);
COMMIT;
